"""minillava.convert: every layout to every other, compared with safetensors' own reader; and what
interrupts it."""

import errno
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

import hf
import pytest
import torch
from bounds import assert_within, gamma, network
from commands import python, status_of
from paths import REFERENCE, ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minillava
from minillava.checkpoint import write
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.write import save_tensors
from minillava.cli.doors import enter
from minillava.convert import plan, run
from minillava.convert.flags import read_size
from minillava.convert.run import convert
from minillava.fast import quantize
from minillava.fast.quantize import LINE, Int8Linear
from minillava.files.hub import CLIP_RELEASE
from minillava.files.new_folder import OWNER, new_folder
from minillava.files.tensors import INDEX_NAME, SINGLE_NAME, SafetensorsFile
from minillava.inspection.report import inspect_folder
from minillava.llava import Llava

main, door = partial(enter, "inspect"), partial(enter, "convert")

SHAPES = ROOT / "weights" / "shapes"

TABLES = {
    "hf": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    "original": ("model.embed_tokens.weight", "lm_head.weight"),
}
TOWER = "vision_tower.vision_model."
KEYS = {"hf": "hub", "original": "original"}  # --to: the dialect of hf.DIALECTS with the same names
ROWS = [[1, 5, hf.IMAGE, 17, 300, 42], [1, 7, 8, hf.IMAGE, 9]]


def held(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, as safetensors itself reads it."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    names = Counter(name for file in files for name in file)
    assert set(names.values()) == {1}
    return {name: tensor.clone() for file in files for name, tensor in file.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes, shapes and bits."""
    return found.keys() == expected.keys() and all(
        t.dtype == expected[name].dtype
        and t.shape == expected[name].shape
        and t.numpy().tobytes() == expected[name].numpy().tobytes()
        for name, t in found.items()
    )


def logits(folder: Path, **options) -> torch.Tensor:
    assistant = minillava.load(folder, device="cpu", dtype="float32", attention="eager", **options)
    size = assistant.image_processor.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return assistant.model(ROWS, pixels).logits


def changed(source: Path, target: Path, tower: Path | None = None) -> dict[str, tuple]:
    """The fields in which two folders' configurations differ."""
    before, after = read_config(source, tower), read_config(target)
    pairs = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in fields(before)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def copy(folder: Path, name: str = "plain", **config) -> Path:
    """A stored checkpoint to be changed."""
    shutil.copytree(REFERENCE / name, folder)
    hf.write_json({**hf.read_json(folder / "config.json"), **config}, folder / "config.json")
    return folder


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Other tensors instead of stored ones; None takes one out."""
    new = {
        name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()
    } | tensors
    save_file(
        {name: tensor for name, tensor in new.items() if tensor is not None}, folder / SINGLE_NAME
    )


def command(*args: object, capsys) -> tuple[int, str]:
    """The exit status and what is on stderr besides the progress."""
    status = status_of(door, args)
    printed = capsys.readouterr()
    assert printed.out == ""
    return status, [line for line in printed.err.splitlines() if line.startswith(("error", "note"))]


# --- the same bits under other names --------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "original"])
@pytest.mark.parametrize("dialect", hf.DIALECTS)
def test_every_layout_becomes_every_other_and_answers_the_same(
    tmp_path, write_dialect, dialect, to
):
    """A converted model would give other answers than the one it was made from."""
    options = write_dialect(dialect, tmp_path / "source", shards=2)
    source, tower = options["weights"], options.get("vision_tower")
    target = tmp_path / "new" / "target"
    notes = convert(source, target, to, vision_tower=tower, shard_size=2e5)
    found = held(target)
    stored = load_file(REFERENCE / "plain" / SINGLE_NAME)
    expected = {
        n: stored[key]
        for n, key in hf.read_json(REFERENCE / "dialects.json")[KEYS[to]]["."]["keys"].items()
    }
    rows = 440 if dialect.startswith("original") else 448
    for name in TABLES[to]:
        expected[name] = expected[name][:rows].clone()
        if to == "hf" and rows < 448:
            table = expected[name].double()
            mean, bound = table.mean(0), gamma(rows + 1, torch.float32) * table.abs().mean(0)
            assert_within(found[name][rows:], (mean.expand(8, -1), bound.expand(8, -1)))
            assert found[name].shape[0] == 448
            found[name] = found[name][:rows].clone()
    assert same(found, expected)
    index = hf.read_json(target / INDEX_NAME)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held(target).values())
    largest = max(path.stat().st_size for path in target.glob("*.safetensors"))
    assert len(set(index["weight_map"].values())) > 2
    assert largest < 2.2e5  # and their headers
    # who may read the one may read the other
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1
    before, after = logits(source, **({"vision_tower": tower} if tower else {})), logits(target)
    if rows < 448 and to == "hf":
        exactly = minillava.load(target, device="cpu", dtype="float64", attention="eager").model
        size = exactly.config.vision.image_size
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
        allowed = network(exactly, lambda: {"logits": exactly(ROWS, pixels).logits[..., :rows]})[
            "logits"
        ]
        for found in (before, after[..., :rows]):  # another width of the product, other last digits
            assert_within(found, allowed)
        assert "440 is <image>" in notes[0] or "<image> is 440" in notes[0]
    else:
        assert torch.equal(after, before)
    assert not (tmp_path / "new" / "target.partial").exists()


@pytest.mark.parametrize("dialect", ["hub", "buffers", "original", "original-bare"])
def test_safetensors_keeps_names_files_and_every_tensor(tmp_path, write_dialect, dialect):
    """--to safetensors would rename a tensor, or leave the tokenizer behind."""
    source = write_dialect(dialect, tmp_path / "source")["weights"]
    expected = held(source)
    torch.save(expected, source / "pytorch_model.bin")
    (source / SINGLE_NAME).unlink()
    convert(source, tmp_path / "target", "safetensors")
    assert same(held(tmp_path / "target"), expected)
    side = {path.name for path in source.iterdir() if path.is_file()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "target").iterdir()} == side | {SINGLE_NAME}
    for name in side:
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()


def test_bin_shards_with_tensors_that_share_their_bytes(tmp_path, write_dialect):
    """torch.save writes two names of one tensor once, and a view with all of what it is a view
    of."""
    source = write_dialect("original", tmp_path / "source")["weights"]
    tensors = held(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.norm.weight"] = torch.randn(64, 3)[:, 1]
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    parts[0] |= {name: parts[1].pop(name) for name in TABLES["original"] if name in parts[1]}
    (source / SINGLE_NAME).unlink()
    for i, part in enumerate(parts):
        torch.save(part, source / f"pytorch_model-{i}.bin")
    placed = {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}
    hf.write_json({"weight_map": placed}, source / "pytorch_model.bin.index.json")
    for to in ("safetensors", "original"):
        convert(source, tmp_path / to, to)
        assert same(
            held(tmp_path / to), {name: tensor.contiguous() for name, tensor in tensors.items()}
        )
        assert not list((tmp_path / to).glob("*.bin*"))


@pytest.mark.parametrize("name", ["plain", "grouped", "tied"])
def test_to_the_original_and_back_is_where_it_came_from(tmp_path, name):
    """A way there and back would lose a tensor, a config's field or a special token."""
    source = REFERENCE / name
    convert(source, tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "back", "hf")
    assert same(held(tmp_path / "back"), load_file(source / SINGLE_NAME))
    assert changed(source, tmp_path / "original") == {"vision_tower_name": (None, CLIP_RELEASE)}
    assert changed(source, tmp_path / "back") == {}
    tokenizer = hf.read_json(source / "tokenizer_config.json")
    back = hf.read_json(tmp_path / "back" / "tokenizer_config.json")
    same_fields = (
        "added_tokens_decoder",
        "legacy",
        "pad_token",
        "padding_side",
        "bos_token",
        "eos_token",
        "unk_token",
    )
    assert {key: back[key] for key in same_fields} == {key: tokenizer[key] for key in same_fields}


def test_unusual_numbers_survive_every_step(tmp_path):
    """A NaN with a payload, minus zero, and a number that float32 does not have."""
    source = copy(tmp_path / "source")
    odd = torch.tensor([0x7FF8_0000_0000_1234, -(2**63), 0x3FF0_0000_0000_0001] + [0] * 29).view(
        torch.float64
    )
    change(source, **{f"{TOWER}post_layernorm.bias": odd})
    convert(source, tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "back", "hf")
    assert same(held(tmp_path / "back"), held(source))


def test_config_fields_survive_or_are_named(tmp_path, write_dialect, capsys):
    """Every field that differs from the default, in both directions."""
    text = hf.read_json(REFERENCE / "grouped" / "config.json")["text_config"]
    text |= {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rms_norm_eps": 1e-3,
    }
    source = copy(tmp_path / "hub", "grouped", text_config=text, vision_feature_layer=-3,
                  vision_feature_select_strategy="full")  # fmt: skip
    hf.write_json(
        {"eos_token_id": [2, 9], "pad_token_id": 4, "temperature": 0.9},
        source / "generation_config.json",
    )
    for to in ("hf", "original"):
        convert(source, tmp_path / to, to)
        assert changed(source, tmp_path / to).keys() <= {"vision_tower_name"}
        assert hf.read_json(tmp_path / to / "generation_config.json")["temperature"] == 0.9
        assert torch.equal(logits(tmp_path / to), logits(source))
    original = write_dialect("original", tmp_path / "square")["weights"]
    config = {
        **hf.read_json(original / "config.json"),
        "image_aspect_ratio": "square",
        "mm_vision_tower": "my/clip",
    }
    hf.write_json(config, original / "config.json")
    convert(original, tmp_path / "square original", "original")
    assert changed(original, tmp_path / "square original") == {}
    status, notes = command(original, tmp_path / "square hub", "--to", "hf", capsys=capsys)
    assert status == 0
    differing = changed(original, tmp_path / "square hub")
    assert differing.keys() == {
        "text", "image_token_id", "pad_token_id", "image_aspect_ratio", "vision_tower_name",
    }  # fmt: skip
    assert "image_aspect_ratio" in notes[0]
    assert "appended 8 rows" in notes[1]


def test_another_dtype_is_that_of_every_weight_and_of_the_config(tmp_path, write_dialect):
    """The config would go on naming the old dtype, or computed tables would be rounded."""
    source = write_dialect("buffers", tmp_path / "source")["weights"]
    computed = (".inv_freq", ".position_ids")
    for to in ("hf", "safetensors"):
        convert(source, tmp_path / to, to, dtype=torch.bfloat16)
        expected = {n: t if n.endswith(computed) else t.bfloat16() for n, t in held(source).items()}
        if to == "hf":
            expected = {name: t for name, t in expected.items() if not name.endswith(computed)}
        found = held(tmp_path / to)
        assert found.keys() == expected.keys()
        assert all(
            found[n].dtype == expected[n].dtype and torch.equal(found[n], expected[n])
            for n in found
        )
        config = hf.read_json(tmp_path / to / "config.json")
        assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path, capsys):
    """A large weight would become infinity in float16, and the model answer NaN."""
    source = copy(tmp_path / "source")
    change(source, **{"multi_modal_projector.linear_1.bias": torch.full((64,), 70000.0)})
    for to in ("original", "safetensors"):
        status, errors = command(
            source, tmp_path / "x", "--to", to, "--dtype", "float16", capsys=capsys
        )
        assert status == 1
        assert errors == [
            "error: multi_modal_projector.linear_1.bias has numbers too large for float16; use "
            "bfloat16"
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- several folders ------------------------------------------------------------------------------


def write_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA of one layer; returns what it adds, by the layer's name on the hub."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, generator=generator), torch.randn(96, 2, generator=generator)
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["up_proj"],
        "layers_to_transform": [1],
    }
    hf.write_json(config, folder / "adapter_config.json")
    return {"language_model.model.layers.1.mlp.up_proj.weight": (b @ a) * 3.0}


def test_an_adapter_is_merged_into_what_is_written(tmp_path):
    """--adapter would be ignored, and the base alone be written."""
    source = REFERENCE / "plain"
    added = write_adapter(tmp_path / "adapter")
    convert(source, tmp_path / "hf", "hf", adapter=tmp_path / "adapter")
    stored = held(source)
    expected = stored | {name: stored[name] + delta for name, delta in added.items()}
    assert same(held(tmp_path / "hf"), expected)
    assert not same(expected, stored)


def test_what_made_the_weights_does_not_come_along(tmp_path):
    """Transformers would look for an adapter where there is an adapter_config.json."""
    write_adapter(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "hf", "hf", model_base=REFERENCE / "plain")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert "config.json" in names
    assert not any(name.startswith("adapter") for name in names)


def test_a_projector_and_its_base_become_one_folder(tmp_path, write_dialect):
    """The base's own projector would win over the one that was given."""
    options = write_dialect("original-bare", tmp_path / "whole")
    whole, source = options["weights"], tmp_path / "projector"
    source.mkdir()
    tensors = held(whole)
    projector = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    torch.save(projector, source / "mm_projector.bin")
    shutil.copy(whole / "config.json", source)
    save_file(tensors, whole / SINGLE_NAME)
    parts = {"vision_tower": options["vision_tower"], "model_base": whole}
    convert(source, tmp_path / "original", "original", **parts)
    keys = hf.read_json(REFERENCE / "dialects.json")["original"]["."]["keys"]
    stored = held(REFERENCE / "plain")
    expected = {name: stored[key] for name, key in keys.items()}
    expected |= {name: expected[name][:440].clone() for name in TABLES["original"]}
    assert same(held(tmp_path / "original"), expected)
    assert torch.equal(logits(tmp_path / "original"), logits(source, **parts))


def test_a_clip_of_other_colours_keeps_them(tmp_path, write_dialect):
    """Without preprocessor_config.json a reader takes CLIP's own numbers."""
    source, tower = write_dialect("original-bare", tmp_path / "source").values()
    processor = {
        **hf.read_json(tower / "preprocessor_config.json"),
        "image_mean": [0.5, 0.25, 0.125],
    }
    hf.write_json(processor, tower / "preprocessor_config.json")
    for to in ("hf", "original"):
        convert(source, tmp_path / to, to, vision_tower=tower)
        assert minillava.load(tmp_path / to, device="cpu").image_processor.mean == (
            0.5,
            0.25,
            0.125,
        )


def test_tokens_of_early_models_stay_where_they_were(tmp_path, write_dialect, capsys):
    """The marks before and after each picture would be lost, or taken for words."""
    source = write_dialect("original", tmp_path / "source")["weights"]
    hf.write_json(
        {**hf.read_json(source / "config.json"), "mm_use_im_start_end": True},
        source / "config.json",
    )
    hf.write_json({"<im_start>": 441, "<im_end>": 440}, source / "added_tokens.json")
    convert(source, tmp_path / "original", "original")
    assert changed(source, tmp_path / "original") == {}
    tokenizer = minillava.load(tmp_path / "original", device="cpu").tokenizer
    assert tokenizer.encode("<image>") == [1, 441, hf.IMAGE, 440]
    status, errors = command(source, tmp_path / "hf", "--to", "hf", capsys=capsys)
    assert status == 1
    assert "puts <im_start> before each picture" in errors[0]


def test_an_image_id_that_is_a_word_and_a_token_that_no_prompt_contains_do_not_reach_the_hub(
    tmp_path, write_dialect
):
    """The hub's readers would take a word of the question for the picture's place."""
    source = write_dialect("original", tmp_path / "source")["weights"]
    config = {
        **hf.read_json(source / "config.json"),
        "image_token_index": 5,
        "mm_use_im_patch_token": True,
    }
    hf.write_json(config, source / "config.json")
    convert(source, tmp_path / "hf", "hf")
    config = read_config(tmp_path / "hf")
    assert (config.image_token_id, config.pad_token_id, config.text.vocab_size) == (440, 441, 448)
    assert config.added_tokens == ()
    assert minillava.load(tmp_path / "hf", device="cpu").tokenizer.encode("<image>") == [
        1,
        hf.IMAGE,
    ]


def test_a_stored_head_is_the_head_although_the_config_says_tied(tmp_path):
    """A stored head would be dropped in favour of the embeddings, and change every answer."""
    source = copy(tmp_path / "source", tie_word_embeddings=True)
    convert(source, tmp_path / "hf", "hf")
    assert same(held(tmp_path / "hf"), held(source))
    assert read_config(tmp_path / "hf").text.tie_word_embeddings is False


@pytest.mark.parametrize("to", ["hf", "original"])
def test_side_files_stay_within_their_dialect(tmp_path, to):
    """An optimizer's state would be copied along, or another layout's tokenizer contradict ours."""
    source = copy(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("as you like")
    (source / "optimizer.pt").write_text("large")
    convert(source, tmp_path / to, to)
    names = {path.name for path in (tmp_path / to).iterdir()}
    common = {SINGLE_NAME, "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model",
              "tokenizer_config.json"}  # fmt: skip
    assert names == common | (
        {"tokenizer.json", "LICENSE", "processor_config.json"} if to == "hf" else set()
    )


# --- what a layout needs --------------------------------------------------------------------------


def without_last_block(folder: Path) -> Path:
    source = copy(folder)
    names = load_file(source / SINGLE_NAME)
    lost = {
        n for n in names if n.startswith((f"{TOWER}encoder.layers.2.", f"{TOWER}post_layernorm."))
    }
    assert len(lost) == 18
    change(source, **dict.fromkeys(lost))
    return source


def test_a_last_block_that_nobody_stored_passes_its_input_on(tmp_path, capsys):
    """A block that is missing since no answer needs it would stop the way to the hub."""
    source = without_last_block(tmp_path / "source")
    status, notes = command(source, tmp_path / "hf", "--to", "hf", capsys=capsys)
    assert status == 0
    assert notes[0].startswith("note: made 18 tensors of the vision tower")
    made = {name: t for name, t in held(tmp_path / "hf").items() if name not in held(source)}
    assert len(made) == 18
    for name, tensor in made.items():
        assert torch.equal(
            tensor, torch.full_like(tensor, float("norm" in name and name.endswith("weight")))
        ), name
    convert(source, tmp_path / "original", "original")
    assert len(held(tmp_path / "original")) == len(held(source))
    assert torch.equal(logits(tmp_path / "hf"), logits(source))


@pytest.mark.parametrize(
    ("kind", "to", "message"),
    [
        ("linear", "hf", "its projector has 1 layer(s); Hugging Face's has two"),
        ("unbiased", "original", "has no projector without biases; use the hub's"),
        ("bare", "hf", "holds no vision tower"),
        ("bare", "original", "holds no vision tower"),
        ("incomplete", "hf", "projector.linear_2.bias is missing"),
        ("tower", "safetensors", "--to safetensors keeps the tensors of SRC alone"),
        ("no config", "safetensors", "config.json: not found"),
        ("no tokenizer", "hf", "tokenizer.model: not found"),
    ],
)
def test_what_cannot_be_converted_says_why_and_leaves_nothing(
    tmp_path, write_dialect, capsys, kind, to, message
):
    """A model that the layout cannot hold would be written wrong, or half."""
    source = write_dialect("original-bare" if kind == "bare" else "original", tmp_path / "source")[
        "weights"
    ]
    config, arguments = hf.read_json(source / "config.json"), []
    if kind == "linear":
        hf.write_json({**config, "mm_projector_type": "linear"}, source / "config.json")
        two = {
            f"model.mm_projector.{i}.{part}": None for i in (0, 2) for part in ("weight", "bias")
        }
        one = {
            f"model.mm_projector.{part}": held(source)[f"model.mm_projector.0.{part}"]
            for part in ("weight", "bias")
        }
        change(source, **two, **one)
    elif kind == "unbiased":
        source = copy(tmp_path / "unbiased", multimodal_projector_bias=False)
        change(source, **{f"multi_modal_projector.linear_{i}.bias": None for i in (1, 2)})
    elif kind == "incomplete":
        change(source, **{"model.mm_projector.2.bias": None})
    elif kind == "tower":
        arguments = ["--vision-tower", source]
    elif kind.startswith("no "):
        (source / {"no config": "config.json", "no tokenizer": "tokenizer.model"}[kind]).unlink()
    before = sorted(tmp_path.iterdir())
    status, errors = command(source, tmp_path / "target", "--to", to, *arguments, capsys=capsys)
    assert status == 1
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(tmp_path.iterdir()) == before


def test_one_projector_layer_keeps_its_name_without_a_number(tmp_path, write_dialect):
    """The only layer of a projector would get a number that LLaVA does not look for."""
    source = write_dialect("original", tmp_path / "source")["weights"]
    hf.write_json(
        {**hf.read_json(source / "config.json"), "mm_projector_type": "linear"},
        source / "config.json",
    )
    two = {f"model.mm_projector.{i}.{part}": None for i in (0, 2) for part in ("weight", "bias")}
    one = {
        f"model.mm_projector.{part}": held(source)[f"model.mm_projector.0.{part}"]
        for part in ("weight", "bias")
    }
    change(source, **two, **one)
    convert(source, tmp_path / "target", "original")
    assert same(held(tmp_path / "target"), held(source))


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["original-bare", "without last block", "tied", "stretched"])
def test_transformers_loads_the_hub_layout_and_agrees_to_the_bit(tmp_path, write_dialect, kind):
    """transformers would make up what is missing, and its logits would differ from ours."""
    pytest.importorskip("transformers", minversion="5", reason="live parity needs transformers 5")
    tower = None
    if kind == "original-bare":
        source, tower = write_dialect(kind, tmp_path / "source").values()
    elif kind == "tied":
        convert(REFERENCE / "tied", tmp_path / "source", "original")
        source = tmp_path / "source"
    elif kind == "stretched":
        text = hf.read_json(REFERENCE / "plain" / "config.json")["text_config"]
        text |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
        source = copy(tmp_path / "source", text_config=text)
    else:
        source = without_last_block(tmp_path / "source")
    convert(source, tmp_path / "hf", "hf", vision_tower=tower)
    theirs = hf.load(tmp_path / "hf")  # raises for a missing or unexpected tensor
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ours = minillava.load(tmp_path / "hf", device="cpu", dtype="float32", attention="eager")
    with torch.no_grad():
        found = ours.model(ROWS[:1], pixels).logits
    assert torch.equal(found, hf.forward(theirs, ROWS[:1], pixels)["logits"])


@pytest.mark.parity
def test_transformers_processor_makes_as_many_tokens_as_the_model_wants(tmp_path, write_dialect):
    """transformers would fail with fewer image tokens in the prompt than patches."""
    pytest.importorskip("transformers", minversion="5", reason="live parity needs transformers 5")
    pytest.importorskip(
        "google.protobuf", reason="transformers reads tokenizer.model with protobuf"
    )
    from PIL import Image
    from transformers import LlavaProcessor

    hf.quiet()
    source, tower = write_dialect("original-bare", tmp_path / "source").values()
    convert(source, tmp_path / "hf", "hf", vision_tower=tower)
    processor = LlavaProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    picture = Image.open(REFERENCE / "pictures" / "square.png").convert("RGB")
    given = processor(images=picture, text="<image>Where?", return_tensors="pt")
    assert (given["input_ids"] == 440).sum() == read_config(tmp_path / "hf").tokens_per_image
    assert processor.tokenizer.pad_token_id == 441
    theirs = hf.load(tmp_path / "hf")
    with torch.no_grad():
        assert theirs(**given).logits.isfinite().all()


# --- tokens that a fine-tune added ----------------------------------------------------------------


def with_boxes(folder: Path, dialect: str) -> Path:
    """A model with three tokens of its own, saved as transformers does; the original has no <image>
    before them."""
    source = copy(folder)
    first = 442 if dialect == "hf" else 440
    if dialect == "original":
        convert(REFERENCE / "plain", folder.with_name("plain-original"), "original")
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("plain-original"), folder)
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    texts = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<box>": first,
        "</box>": first + 1,
        "[SEG]": first + 2,
    }
    texts |= {"<image>": 440, "<pad>": 441} if dialect == "hf" else {}
    plain = ("<box>", "</box>")
    entries = {str(i): {"content": t, **flags, "special": t not in plain, "rstrip": t == "</box>"}
               for t, i in texts.items()}  # fmt: skip
    raw = hf.read_json(source / "tokenizer_config.json")
    raw |= {"added_tokens_decoder": entries, "additional_special_tokens": ["[SEG]"]}
    hf.write_json(raw, source / "tokenizer_config.json")
    return source


@pytest.mark.parametrize("dialect", ["hf", "original"])
@pytest.mark.parametrize("to", ["hf", "original"])
def test_added_tokens_go_along(tmp_path, dialect, to):
    """They were lost on the way to the other layout, and the first of them became <image> on the
    way to the hub."""
    source = with_boxes(tmp_path / "source", dialect)
    convert(source, tmp_path / "new", to)
    before, after = (
        minillava.load(path, device="cpu").tokenizer for path in (source, tmp_path / "new")
    )
    markers = ("<image>", "<pad>")
    mine = [{i: t for i, t in x.by_id.items() if t.text not in markers} for x in (before, after)]
    assert mine[0] == mine[1] and len(mine[0]) == 6
    text = "a <box>dog</box> \n[SEG]</s>"
    assert after.encode(text) == before.encode(text)
    config = read_config(tmp_path / "new")
    assert config.image_token_id not in mine[0] or to == "original"
    assert inspect_folder(tmp_path / "new").loadable
    convert(tmp_path / "new", tmp_path / "back", dialect)
    assert minillava.load(tmp_path / "back", device="cpu").tokenizer.encode(text) == before.encode(
        text
    )


@pytest.mark.parity
@pytest.mark.parametrize("to", ["hf", "original"])
def test_transformers_reads_added_tokens_as_we_write_them(tmp_path, to):
    """transformers would cut an added token into pieces, or give it another id."""
    pytest.importorskip("transformers", minversion="5", reason="live parity needs transformers 5")
    pytest.importorskip(
        "google.protobuf", reason="transformers reads tokenizer.model with protobuf"
    )
    from transformers import LlamaTokenizer

    convert(with_boxes(tmp_path / "source", "original"), tmp_path / "new", to)
    theirs = LlamaTokenizer.from_pretrained(tmp_path / "new")
    ours = minillava.load(tmp_path / "new", device="cpu").tokenizer
    text = "a <box>dog</box> \n[SEG]"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(
        ours.encode(text)
    )
    assert theirs.convert_tokens_to_ids(["<box>", "</box>", "[SEG]"]) == [440, 441, 442]
    assert len(theirs) <= read_config(tmp_path / "new").text.vocab_size


def test_a_merged_adapter_s_tokens_go_along(tmp_path):
    """The adapter's tokenizer is that of the run; its base's would take its tokens for text."""
    source, adapter = copy(tmp_path / "source"), tmp_path / "adapter"
    adapter.mkdir()
    name = "language_model.model.layers.0.self_attn.q_proj"
    shape = load_file(source / SINGLE_NAME)[f"{name}.weight"].shape
    stored = f"base_model.model.{name}"
    pair = {
        f"{stored}.lora_A.weight": torch.ones(1, shape[1]),
        f"{stored}.lora_B.weight": torch.ones(shape[0], 1),
    }
    save_file(pair, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "layers_to_transform": [0]}
    hf.write_json(settings, adapter / "adapter_config.json")
    hf.write_json({"<image>": 440, "<pad>": 441, "<box>": 442}, adapter / "added_tokens.json")
    for to in ("hf", "original"):
        convert(source, tmp_path / to, to, adapter=adapter)
        assert minillava.load(tmp_path / to, device="cpu").tokenizer.added["<box>"] == 442


# --- what goes wrong on the way -------------------------------------------------------------------


def test_a_folder_that_holds_something_is_not_touched(tmp_path, capsys):
    """A conversion would overwrite or remove files that the user has there."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("this too")
    (tmp_path / "new.partial").mkdir()
    source = copy(tmp_path / "source")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, message in {
        "full": "exists and is not an empty folder",
        "file": "exists and is not an empty folder",
        "source": "exists and is not an empty folder",
        "new": "left by an interrupted run",
    }.items():
        status, errors = command(source, tmp_path / name, "--to", "original", capsys=capsys)
        assert status == 1
        assert len(errors) == 1
        assert message in errors[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    assert command(source, tmp_path / "empty", "--to", "original", capsys=capsys) == (0, [])
    assert torch.equal(logits(tmp_path / "empty"), logits(source))


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    """A full disk would be noticed after minutes of writing."""
    monkeypatch.setattr(
        run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 600_000)
    )
    monkeypatch.setattr(write, "save_file", lambda *arguments, **options: pytest.fail("wrote"))
    status, errors = command(REFERENCE / "plain", tmp_path / "x", "--to", "original", capsys=capsys)
    assert status == 1
    assert errors == [f"error: {tmp_path / 'x'}: needs 0.00 GB, the disk has 0.00 GB free"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_a_bit_that_the_disk_turned_is_noticed(tmp_path, monkeypatch, capsys, to):
    """A bit that the disk turned would be in the model from then on."""

    def save(tensors, path, **options):
        save_file(tensors, path, **options)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(write, "save_file", save)
    status, errors = command(REFERENCE / "plain", tmp_path / "x", "--to", to, capsys=capsys)
    assert status == 1
    assert len(errors) == 1
    assert "does not read back as it was written" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_under_the_name_of_another_is_noticed(tmp_path, monkeypatch, capsys):
    """Two tensors of one shape would change places without an error."""
    swapped = {
        "language_model.layers.0.mlp.up_proj.weight": "gate_proj",
        "language_model.layers.0.mlp.gate_proj.weight": "up_proj",
    }
    stored_name = plan.stored_name

    def swap(name, *arguments):
        found = stored_name(name, *arguments)
        return (
            found.replace("up_proj" if "up_proj" in found else "gate_proj", swapped.get(name, ""))
            if name in swapped
            else found
        )

    monkeypatch.setattr(plan, "stored_name", swap)
    status, errors = command(REFERENCE / "plain", tmp_path / "x", "--to", "original", capsys=capsys)
    assert status == 1
    assert "does not read back" in errors[0]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C would leave a half-written folder behind."""

    def save(tensors, path, **options):
        save_file(tensors, path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "save_file", save)
    assert door([str(REFERENCE / "plain"), str(tmp_path / "x"), "--to", "hf"]) == 130
    assert list(tmp_path.iterdir()) == []


KILL = """
import os, signal, sys
from minillava.checkpoint import write
from minillava.cli.doors import enter

save_file = write.save_file

def save(tensors, path, **options):
    save_file(tensors, path, **options)
    os.kill(os.getpid(), signal.SIGKILL)

write.save_file = save
enter("convert", sys.argv[1:])
"""


def test_a_conversion_that_is_killed_leaves_no_folder_that_loads_and_the_next_removes_it(tmp_path):
    """A killed conversion would leave a folder that loads as a whole model, or one that had to be
    removed by hand, after SIGTERM, too."""
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    arguments = [str(REFERENCE / "plain"), str(target), "--to", "hf", "--shard-size", "200KB"]
    done = python("-c", KILL, *arguments, path=(ROOT / "tools",))
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith("write: file 1 of ")
    assert not target.exists()
    assert len(list(partial.glob("*.safetensors"))) == 1
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        minillava.load(partial)
    assert (partial / OWNER).exists()
    door(arguments)  # again
    assert not partial.exists()
    assert not (target / OWNER).exists()
    assert set(held(REFERENCE / "plain")) <= set(held(target))


def test_what_a_living_run_is_writing_is_left_alone(tmp_path, capsys):
    """A second conversion to the same place would remove the first one's files."""
    with new_folder(tmp_path / "target") as folder:
        (folder / "a").touch()
        assert door([str(REFERENCE / "plain"), str(tmp_path / "target"), "--to", "hf"]) == 1
        assert (
            f"process {os.getpid()} is writing it; wait until that ends" in capsys.readouterr().err
        )
        assert (folder / "a").exists()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "kind", "found"),
    [
        (errno.EACCES, PermissionError, r"may not be written .*chmod"),
        (
            errno.ENOSPC,
            OSError,
            "No space left on device; make room there, then repeat the command",
        ),
    ],
)
def test_a_system_that_does_not_let_us_write_is_told_with_a_step(
    tmp_path, monkeypatch, number, kind, found
):
    """A refused write would be an error number, and leave a half-written folder."""

    def refuse(tensors, path, metadata):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(write, "save_file", refuse)
    with pytest.raises(kind, match=found):
        convert(REFERENCE / "plain", tmp_path / "target", "hf")
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from functools import partial
from minillava.cli.doors import enter

convert = partial(enter, "convert")

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

convert([*sys.argv[3:5], "--to", "original", "--dtype", "float16"])  # what a first time costs besides
done, seen = threading.Event(), [anonymous()]
thread = threading.Thread(target=watch)
thread.start()
status = convert([sys.argv[1], sys.argv[2], "--to", "original", "--dtype", "float16", "--shard-size", "6MB"])
done.set()
thread.join()
print(json.dumps({"status": status, "growth": max(seen) - seen[0], "samples": len(seen)}))
"""


def hub_name(ours: str) -> str:
    if ours.startswith("language_model.") and "lm_head" not in ours:
        return ours.replace("language_model.", "language_model.model.", 1)
    return ours.replace("vision_tower.", TOWER).replace("projector.", "multi_modal_projector.")


@pytest.mark.slow
def test_memory_holds_a_shard_and_not_the_checkpoint(tmp_path):
    """Converted to another dtype, so that every tensor is made in memory rather than mapped from
    its file."""
    status = Path("/proc/self/status")
    if not status.exists() or "RssAnon" not in status.read_text(encoding="utf-8"):
        pytest.skip("needs Linux's /proc to measure memory")
    text = hf.read_json(REFERENCE / "plain" / "config.json")["text_config"]
    text |= {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    source = copy(tmp_path / "large", text_config=text)
    with torch.device("meta"):
        state = Llava(read_config(source)).state_dict()
    tensors = {hub_name(name): torch.zeros(tensor.shape) for name, tensor in state.items()}
    hf.write_weights(tensors, source, shards=4)
    (source / SINGLE_NAME).unlink()
    arguments = [source, tmp_path / "new", REFERENCE / "plain", tmp_path / "warm"]
    done = python("-c", MEASURE, *arguments, path=(ROOT / "tools",))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == 0, done.stderr
    files = [path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors")]
    assert len(files) > 6
    assert found["samples"] > 50
    assert found["growth"] < sum(files) / 2


# --- the command line -----------------------------------------------------------------------------


def test_sizes_and_layouts_are_checked_before_anything_happens(tmp_path, capsys):
    """A mistyped size would be noticed after the model was read, or make endless shards."""
    sizes = {"4GB": 4e9, "512MB": 512e6, "1.5 g": 1.5e9, "200KB": 2e5, "7": 7.0}
    assert {text: read_size(text) for text in sizes} == sizes
    for wrong in (
        ["--to", "hf", "--shard-size", "big"],
        ["--to", "hf", "--shard-size", "0GB"],
        ["--to", "gguf"],
        [],
    ):
        with pytest.raises(SystemExit) as caught:
            door([str(REFERENCE / "plain"), str(tmp_path / "x"), *wrong])
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- quantised ------------------------------------------------------------------------------------


def test_int8_weights_lie_where_the_kernel_can_read_them(tmp_path):
    """So that opening them copies nothing."""
    tensors = {
        "a.weight_int8": torch.ones(64, 64, dtype=torch.int8),
        "a.scale": torch.ones(64),
        "b": torch.ones(32),
    }
    for name in ("x", "name of another length"):
        save_tensors({**tensors, name: torch.ones(32)}, tmp_path / "x.safetensors")
        with (tmp_path / "x.safetensors").open("rb") as file:
            assert (8 + int.from_bytes(file.read(8), "little")) % LINE == 0
        weight = SafetensorsFile(tmp_path / "x.safetensors").read("a.weight_int8")
        layer = Int8Linear(weight, torch.ones(64, dtype=torch.bfloat16))
        assert layer.weight.data_ptr() == weight.data_ptr()
    save_tensors({"b": torch.ones(32)}, tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("to", ["hf", "original"])
@pytest.mark.slow
def test_a_quantised_folder_is_what_loading_would_make(tmp_path, kind, to, capsys):
    """A stored int8 model would answer otherwise than one quantised at its start."""
    status, errors = command(
        SHAPES, tmp_path / "small", "--to", to, "--quantize", kind, capsys=capsys
    )
    assert (status, f"note: {kind} in a form that only minillava reads" in errors) == (0, True)
    ours, theirs = (
        minillava.load(folder, device="cpu", dtype="float32", quantize=quantize)
        for folder, quantize in ((tmp_path / "small", None), (SHAPES, kind))
    )
    for (name, found), (other, expected) in zip(
        ours.model.state_dict().items(), theirs.model.state_dict().items(), strict=True
    ):
        assert (name, found.dtype) == (other, expected.dtype)
        assert torch.equal(found, expected)
    picture = SHAPES / "example-1.png"
    assert ours.ask(picture, max_new_tokens=40) == theirs.ask(picture, max_new_tokens=40) != ""
    weights, sizes = (
        (f, sum(p.stat().st_size for p in f.glob("*.safetensors")))
        for f in (tmp_path / "small", SHAPES)
    )
    assert weights[1] < 0.9 * sizes[1]
    report = inspect_folder(tmp_path / "small")
    assert report.loadable
    whole = {part: found["parameters"] for part, found in inspect_folder(SHAPES).parts.items()}
    assert {part: found["parameters"] for part, found in report.parts.items()} == whole
    assert report.dtypes["int8" if kind == "int8" else "uint8"]["tensors"] >= 20


@pytest.fixture
def packed(tmp_path) -> Path:
    convert(SHAPES, tmp_path / "packed", "hf", quantize="int4")
    return tmp_path / "packed"


def order_of(folder: Path) -> str:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.metadata()["int4_order"]


def with_order(folder: Path, order: str | None, change=lambda packed: packed) -> None:
    """The same weights, said to be in another order."""
    tensors = {
        name: change(tensor) if name.endswith("weight_int4_packed") else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    metadata = {"format": "pt"} | ({} if order is None else {"int4_order": order})
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


def test_int4_opens_without_being_packed_anew(packed, monkeypatch):
    """Packing took 40 s of 7B's every start."""
    assert order_of(packed).split() == [str(i) for i in quantize.packed_order().tolist()]
    monkeypatch.setattr(quantize, "pack_whole", lambda nibbles: pytest.fail("packed anew"))
    found = minillava.load(packed, device="cpu", dtype="float32")
    files = list(packed.glob("*.safetensors"))
    layers = [m for m in found.model.modules() if isinstance(m, quantize.Int4Linear)]
    assert files and layers
    assert all(layer.weight.data_ptr() % quantize.LINE == 0 for layer in layers)


def test_int4_of_another_processor_is_packed_anew_and_says_so(packed):
    """Its tiles are of 16 rows, neighbours in the halves of a byte."""
    expected = minillava.load(packed, device="cpu", dtype="float32").model.state_dict()
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    places = torch.tensor(order).view(2, 8)  # columns in the low halves, and in the high

    def change(weight: torch.Tensor) -> torch.Tensor:
        q = quantize.unpack(weight).view(len(weight) // 16, 16, -1)
        low, high = (q[:, place].transpose(1, 2).reshape(len(weight), -1) for place in places)
        return low | high << 4

    with_order(packed, " ".join(map(str, torch.tensor(order).argsort().tolist())), change)
    with pytest.warns(UserWarning, match="packed for another processor and are packed anew"):
        found = minillava.load(packed, device="cpu", dtype="float32").model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("order", [None, "", "0 1 1 2", "0 1 2", "one two", "0 1 2 3 4 5", "-1 0"])
@pytest.mark.slow
def test_an_order_that_is_none_is_refused(packed, order):
    """Packed weights in an unknown order would be read as other numbers."""
    with_order(packed, order)
    with pytest.raises(ValueError, match=r"weight_int4_packed is int4 packed in an unknown order"):
        minillava.load(packed, device="cpu")


@pytest.fixture
def small(tmp_path) -> Path:
    convert(SHAPES, tmp_path / "small", "hf", quantize="int8")
    return tmp_path / "small"


def test_the_doctor_finds_a_quantised_model_well(small, capsys):
    """The doctor would call a sound quantised model broken."""
    assert main([str(small), "--doctor", "--device", "cpu", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\nok ") == 8
    assert "stored as int8" in printed


def test_what_is_quantised_is_not_changed_again(small, tmp_path):
    """Quantising twice, or adding an adapter, would round the weights a second time."""
    with pytest.raises(ValueError, match="is quantised already; leave --quantize out"):
        minillava.load(small, quantize="int4")
    with pytest.raises(ValueError, match="is quantised; convert the weights that it was made from"):
        convert(small, tmp_path / "again", "original")
    folder = tmp_path / "adapter"
    folder.mkdir()
    matrices = {"lora_A": torch.zeros(2, 192), "lora_B": torch.zeros(192, 2)}
    prefix = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.{name}.weight": w for name, w in matrices.items()},
        folder / "adapter_model.safetensors",
    )
    hf.write_json({"peft_type": "LORA", "layers_to_transform": [0]}, folder / "adapter_config.json")
    with pytest.raises(ValueError, match=r"q_proj\.weight, which is quantised"):
        minillava.load(small, adapter=folder)


def test_a_weight_that_an_adapter_keeps_whole_replaces_a_quantised_one(small, tmp_path):
    """A head that the adapter has learnt whole would be ignored for the quantised one."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    matrices = {"lora_A": torch.zeros(2, 192), "lora_B": torch.zeros(192, 2)}
    prefix, head = "base_model.model.multi_modal_projector.linear_1", torch.full((640, 192), 0.5)
    tensors = {f"{prefix}.{name}.weight": w for name, w in matrices.items()}
    save_file(
        tensors | {"base_model.model.language_model.lm_head.weight": head},
        folder / "adapter_model.safetensors",
    )
    hf.write_json({"peft_type": "LORA", "layers_to_transform": [0]}, folder / "adapter_config.json")
    model = minillava.load(small, adapter=folder, device="cpu", dtype="float32").model
    assert torch.equal(model.language_model.lm_head.weight, head)


@pytest.mark.parametrize(
    "damage", ["no scale", "wrong scale", "wrong dtype", "weight besides", "wrong shape"]
)
def test_damaged_parts_of_a_quantised_weight_are_named(small, damage):
    """A weight without its scale would be read as whole numbers, or fail without a name."""
    index = small / "model.safetensors.index.json"
    tensors = held(small)
    for path in small.glob("*.safetensors"):
        path.unlink()
    index.unlink(missing_ok=True)
    module = "language_model.model.layers.1.mlp.up_proj"
    weight, scale = f"{module}.weight_int8", f"{module}.scale"
    if damage == "no scale":
        del tensors[scale]
    elif damage == "wrong scale":
        tensors[scale] = tensors[scale][:-1].clone()
    elif damage == "wrong dtype":
        tensors[weight] = tensors[weight].to(torch.uint8)
    elif damage == "weight besides":
        tensors[f"{module}.weight"] = tensors[weight].float()
    else:
        tensors |= {weight: tensors[weight][:64].clone(), scale: tensors[scale][:64].clone()}
    save_file(tensors, small / SINGLE_NAME)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight") as error:
        minillava.load(small)
    assert str(error.value).startswith(str(small))
