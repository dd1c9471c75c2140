"""The JSON files beside config.json that say how pictures are prepared."""

import os
from pathlib import Path
from typing import Any

from minillava.config import LlavaConfig
from minillava.files.disk import read_json
from minillava.image import ImageProcessor
from minillava.tiles.pictures import TileProcessor


def read_image_processor(
    folder: Path, config: LlavaConfig, aspect: str | None = None
) -> ImageProcessor:
    """The processor a folder describes: preprocessor_config.json (transformers 4), the
    `image_processor` of processor_config.json (5), or the tower's own numbers. Raises ValueError
    for steps minillava does not take."""
    folder = Path(folder)
    path = folder / "preprocessor_config.json"
    raw = read_json(path) if os.path.lexists(path) else {}
    if not raw and os.path.lexists(folder / "processor_config.json"):
        path = folder / "processor_config.json"
        raw = read_json(path).get("image_processor", {})
        if not isinstance(raw, dict):
            raise ValueError(
                f"{path}: image_processor is {raw!r:.80}, expected an object; download the file "
                "again"
            )
    siglip = config.vision.siglip
    expected: dict[str, Any] = dict.fromkeys(
        ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True
    )
    expected |= {"resample": 3, "rescale_factor": 1 / 255}  # 3 is Pillow's bicubic
    if siglip:
        expected["do_center_crop"] = False
    for key, value in expected.items():
        if raw.get(key) not in (value, None):
            raise ValueError(f"{path}: {key} is {raw[key]!r:.80}, supported: {value!r}")
    for key in ("size",) if siglip else ("size", "crop_size"):
        size = raw.get(key, config.vision.image_size)
        sides = list(size.values()) if isinstance(size, dict) else [size]
        if not sides or any(side != config.vision.image_size for side in sides):
            raise ValueError(
                f"{path}: {key} is {size!r:.80}, config.json has image_size "
                f"{config.vision.image_size}"
            )
    numbers = ({"mean": [0.5] * 3, "std": [0.5] * 3} if siglip else {}) | _read_numbers(path, raw)
    aspect = aspect or config.image_aspect_ratio
    if aspect != "anyres" or not config.grid:
        return ImageProcessor(config.vision.image_size, aspect, **numbers)
    _check_grid(path, raw, config)
    alone = config.most_tiles > 0
    return TileProcessor(config.vision.image_size, config.grid, **numbers, alone=alone)


def _check_grid(path: Path, raw: dict[str, Any], config: LlavaConfig) -> None:
    """Raises ValueError if the file names other canvases than config.json: pixels and positions
    would not fit together."""
    found = raw.get("image_grid_pinpoints")
    grid = [list(pair) for pair in config.grid]
    if found not in (None, grid, [pair[::-1] for pair in grid]):
        raise ValueError(
            f"{path}: image_grid_pinpoints is {found!r:.80}, config.json has {grid!r:.80}; "
            "download both files again"
        )


def _read_numbers(path: Path, raw: dict[str, Any]) -> dict[str, list[float]]:
    """The mean and standard deviation of each channel, if a file gives them. Raises ValueError for
    what is not three numbers."""
    numbers = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in raw:
            found = raw[theirs]
            numbers_only = isinstance(found, list) and all(
                isinstance(x, (int, float)) for x in found
            )
            if not numbers_only or len(found) != 3 or (ours == "std" and min(found) <= 0):
                raise ValueError(
                    f"{path}: {theirs} is {found!r:.80}, expected three numbers, above zero for "
                    "image_std"
                )
            numbers[ours] = found
    return numbers
