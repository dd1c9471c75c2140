"""Weights that another program quantised are refused: how to recognise them, and which program it
was.

They are recognised by their tensors, not by config.json alone: a fine-tune of a quantised base may
keep `quantization_config` although its own weights are plain.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from minillava.files.disk import read_json
from minillava.files.hub import RELEASE
from minillava.files.tensors import DTYPES, Stored
from minillava.options import dtype_name

# The ends of names that only quantised weights have -> the method; the first that is found names
# it.
_MARKS = {
    r"\.g_idx": "GPTQ",
    r"\.(qweight|qzeros)": "GPTQ or AWQ",
    r"\.(absmax|quant_map|nested_\w+|SCB|weight_format|quant_state\.\w+)": "bitsandbytes",
    r"\.W_q": "HQQ",
    r"\.weight_scale_2": "NVFP4",
    r"(\._data|\.input_scale|\.output_scale)": "quanto or FP8",
    r"\.(codebooks|codes)": "AQLM",
    r"\.(weight_packed|weight_global_scale|compressed|bitmask)": "compressed-tensors",
    r"\.B": "Marlin",
    r"\.(dense_weights|col_vals)": "SpQR",
    r"_quantizer\._\w+": "ModelOpt",
    r"\.[qkv]_scale": "FP8 with a quantised cache",
    r"\.(weight_scale|weight_scale_inv)": "FP8 or int8",
    r"\.weight_scales": "EETQ",
    r"(_weight_qdata|:qdata|_weight_scale)": "torchao",
    r"\.(q_weight|q_invperm|trellis)": "ExLlama",
    r"\.(scales|biases)": "MLX",
    r"\.(Qidxs|centroids|indices)": "vector quantisation",
    r"_(blocks|scales)": "MXFP4",
}

_BESIDE = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt (NVFP4 or FP8)",
    "quantization_config.json": "quantisation",
}


def refuse_quantised(
    folder: Path, tensors: Sequence[Stored], computed: tuple[str, ...], ours: tuple[str, ...]
) -> None:
    """Raises ValueError when the tensors of a folder are another program's quantised ones.
    computed, ours: ends of names that are none of it, whatever their dtype."""
    others = [stored for stored in tensors if not stored.name.endswith((*computed, *ours))]
    packed = [stored for stored in others if stored.dtype not in DTYPES.values()]
    packed.sort(key=lambda stored: not stored.name.endswith("weight"))
    method = next(
        (
            method
            for mark, method in _MARKS.items()
            if any(re.search(f"{mark}$", s.name) for s in others)
        ),
        "",
    )
    said = stated_method(folder)
    if not method and not (said and packed) and len(packed) < 2:
        return  # one tensor of whole numbers will be refused by its name
    shown = (
        packed or [s for s in others if any(re.search(f"{mark}$", s.name) for mark in _MARKS)]
    )[0]
    kind = dtype_name(shown.dtype)
    raise quantised(folder, said or method, f"{shown.name} is {kind}")


def quantised(folder: Path, method: str, found: str) -> ValueError:
    """The error to raise for a folder that is quantised. found: what shows it."""
    by = f" by {method}" if method else ""
    return ValueError(
        f"{folder}: is quantised{by} ({found}); use a release that is not quantised, such as "
        f"{RELEASE}"
    )


def stated_method(folder: Path) -> str:
    """The method that quantised a folder, as config.json or a file beside it says; "" if none
    does."""
    raw = {}
    with suppress(ValueError, OSError):
        raw = read_json(folder / "config.json")
    inner = raw.get("text_config")
    for part in (raw, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(part.get(key), dict) and part[key]:
                method = part[key].get("quant_method") or ("MLX" if key == "quantization" else "")
                return f"{method!s:.40}" if str(method).isprintable() else ""
    return next((method for name, method in _BESIDE.items() if (folder / name).is_file()), "")
