"""What a folder holds and lacks, against the files themselves and against `load`; and the doctor,
who must notice."""

import json
import math
import re
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from bounds import gamma
from commands import status_of
from models import stored
from paths import REFERENCE, ROOT
from safetensors.torch import load_file, save_file

import minillava
from minillava.cache import KVCache
from minillava.cli.doors import enter
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.fast import processor
from minillava.files.hub import CLIP_RELEASE
from minillava.files.tensors import SafetensorsFile
from minillava.inspection import doctor, memory
from minillava.inspection import report as inspect

WEIGHTS = ROOT / "weights" / "shapes"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
PROJECTOR = "multi_modal_projector.linear_2.weight"
DIALECTS = ("hub", "fresh", "modules", "raw", "buffers", "original", "original-bare")


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_weights(folder: Path, change) -> None:
    tensors = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def run(capsys, *arguments) -> tuple[int, str]:
    return status_of(partial(enter, "inspect"), arguments), capsys.readouterr().out


def opens(weights, **others) -> bool:
    try:
        minillava.load(weights, device="cpu", **others)
    except (ValueError, OSError):
        return False
    return True


# --- figures --------------------------------------------------------------------------------------


def test_parameters_and_bytes_are_those_in_the_files():
    """Tensors that no answer needs would be counted as parts of the model."""
    stored = {
        name: tensor
        for path in WEIGHTS.glob("model-*.safetensors")
        for name, tensor in load_file(path).items()
    }
    needed = {
        name: tensor
        for name, tensor in stored.items()
        if "layers.5." not in name and "post_layernorm" not in name
    }
    report = inspect.inspect_folder(WEIGHTS)
    prefixes = {
        "language model": "language_model.",
        "projector": "multi_modal_projector.",
        "vision tower": "vision_tower.",
    }
    for part, prefix in prefixes.items():
        mine = [tensor.numel() for name, tensor in needed.items() if name.startswith(prefix)]
        assert report.parts[part] == {"tensors": len(mine), "parameters": sum(mine)}
    count = sum(tensor.numel() for tensor in needed.values())
    assert report.dtypes == {
        "float16": {"tensors": len(needed), "parameters": count, "bytes": 2 * count}
    }
    assert set(report.unneeded) == stored.keys() - needed.keys()
    assert {tensor["stored"] for tensor in report.tensors} == needed.keys()
    assert {(tensor["stored"], *tensor["shape"]) for tensor in report.tensors} == {
        (name, *tensor.shape) for name, tensor in needed.items()
    }


def test_every_dtype_is_counted(folder):
    """A file of several dtypes would be reported as one of them."""
    change_weights(
        folder, lambda tensors: tensors.update({PROJECTOR: tensors[PROJECTOR].bfloat16()})
    )
    dtypes, count = inspect.inspect_folder(folder).dtypes, 64 * 64
    assert dtypes["bfloat16"] == {"tensors": 1, "parameters": count, "bytes": 2 * count}
    assert dtypes["float32"]["bytes"] == 4 * dtypes["float32"]["parameters"]
    assert dtypes.keys() == {"float32", "bfloat16"}


def test_the_memory_table_is_what_the_model_takes(reference):
    """Of the first two rows; nobody has made the others yet."""
    table = inspect.inspect_folder(reference / "grouped").memory
    for dtype in ("float32", "bfloat16"):
        model = stored("grouped", dtype=dtype).model
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        text, sizes = model.config.text, {}
        for positions in (1000, text.context):
            cache = KVCache(text, 1, positions, dtype=getattr(torch, dtype), device="cpu")
            sizes[positions] = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
        small, full = sizes.values()
        assert table[dtype] == {
            "weights": weights,
            "cache_per_1000": small,
            "full_context": weights + full,
        }
    assert (
        table["int8"]["cache_per_1000"]
        == table["int4"]["cache_per_1000"]
        == table["bfloat16"]["cache_per_1000"]
    )


def test_int8_and_int4_by_hand():
    """int4 was counted for shapes that are stored as int8."""
    shapes = {
        "language_model.embed_tokens.weight": (10, 96),
        "language_model.layers.0.mlp.up_proj.weight": (64, 128),  # two groups a row
        "language_model.layers.0.mlp.down_proj.weight": (20, 96),  # int4 cannot take it
        "language_model.norm.weight": (96,),
        "projector.linear_1.weight": (96, 8),
    }
    rest = 2 * (10 * 96 + 96 + 96 * 8)
    assert memory.weight_bytes(shapes, "int8") == rest + 64 * 130 + 20 * 98
    assert memory.weight_bytes(shapes, "int4") == rest + 64 * (64 + 2 * 4) + 20 * 98
    assert (
        memory.weight_bytes(shapes, "float32")
        == 2 * memory.weight_bytes(shapes, "bfloat16")
        == 2 * (rest + 2 * (64 * 128 + 20 * 96))
    )


def test_seven_billion_weights_are_counted_without_reading_them(folder, monkeypatch):
    """A file with the header of LLaVA-1.5-7B and 14 GB of nothing behind it, which takes no room on
    the disk."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    }
    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    }
    change_json(folder / "config.json", lambda c: c["text_config"].update(sizes, vocab_size=32064))
    change_json(folder / "config.json", lambda c: c["vision_config"].update(tower, image_size=336))
    config = LlavaConfig(
        vision=VisionConfig(**tower, image_size=336, patch_size=14),
        text=TextConfig(**sizes, vocab_size=32064),
    )
    header, end = {}, 0
    for name, shape in inspect.weight_shapes(config).items():
        stored = name.replace("projector.", "multi_modal_projector.").replace(
            "vision_tower.", "vision_tower.vision_model."
        )
        if not name.startswith("language_model.lm_head"):
            stored = stored.replace("language_model.", "language_model.model.")
        start, end = end, end + 2 * math.prod(shape)
        header[stored] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "preprocessor_config.json").unlink()
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name: pytest.fail(f"{name} was read"))
    (folder / "added_tokens.json").write_text(json.dumps({f"<{i}>": i for i in range(442, 32064)}))
    report = inspect.inspect_folder(folder)
    assert report.loadable
    # Llama-7B's 6,738,415,616 and 64 rows twice
    assert report.parts["language model"]["parameters"] == 6_738_939_904
    assert report.parts["projector"]["parameters"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert report.memory["bfloat16"]["cache_per_1000"] == 524_288_000
    assert 14.1e9 < report.memory["bfloat16"]["weights"] == end < 14.2e9
    assert 7.4e9 < report.memory["int8"]["weights"] < 7.7e9


# --- folders of all kinds -------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_whole_and_known(tmp_path, write_dialect, dialect):
    """A layout that load opens would be called unknown or broken."""
    given = write_dialect(dialect, tmp_path)
    report = inspect.inspect_folder(given.pop("weights"), **given)
    assert (report.problems, report.missing, report.misshapen, report.unexpected) == (
        [],
        [],
        [],
        [],
    )
    assert report.loadable
    assert ("original" in report.dialect, "hub" in report.dialect) == (
        "original" in dialect,
        "original" not in dialect,
    )
    plain = inspect.inspect_folder(REFERENCE / "plain")
    assert report.parts["projector"] == plain.parts["projector"]
    assert report.parts["vision tower"] == plain.parts["vision tower"]


def test_a_release_without_tower_says_which_to_get(tmp_path, write_dialect, capsys):
    """Each tensor of the tower would be listed as missing, but not what to download."""
    weights = write_dialect("original-bare", tmp_path)["weights"]
    change_json(weights / "config.json", lambda c: c.update(mm_vision_tower="some/clip-336"))
    status, out = run(capsys, weights)
    assert status == 1
    assert (
        "missing: vision tower; get it with: hf download some/clip-336 --local-dir clip-336; then "
        "pass" in out
    )
    assert out.partition("it cannot be opened as it is:")[2].count("missing") == 1
    change_json(weights / "config.json", lambda c: c.update(mm_vision_tower="/home/me/clip"))
    assert f"hf download {CLIP_RELEASE} " in run(capsys, weights)[1]


def test_a_plain_clip_and_a_plain_llama_are_called_so(tmp_path, write_dialect):
    """A plain CLIP or Llama would be called a LLaVA with many tensors missing."""
    write_dialect("original-bare", tmp_path)
    clip = inspect.inspect_folder(tmp_path / "clip")
    assert "plain CLIP" in clip.dialect
    assert "--vision-tower" in clip.dialect
    tower = load_file(tmp_path / "clip" / "model.safetensors")
    vision = sum(
        t.numel()
        for name, t in tower.items()
        if name.startswith("vision_model.") and "position_ids" not in name
    )
    assert clip.parts["vision tower"]["parameters"] == vision
    assert clip.parts["language model"]["tensors"] == clip.parts["projector"]["tensors"] == 0
    change_json(tmp_path / "config.json", lambda c: c.update(model_type="llama"))
    llama = inspect.inspect_folder(tmp_path)
    assert "plain language model" in llama.dialect
    assert not clip.loadable
    assert not llama.loadable


@pytest.fixture
def lora(tmp_path, write_dialect) -> dict[str, Path]:
    """A LoRA of one layer, as LLaVA saves it, with the folders it needs: what to pass to `load`."""
    whole = write_dialect("original-bare", tmp_path / "base")
    base, folder = whole["weights"], tmp_path / "lora"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    change_json(base / "config.json", lambda c: c.update(model_type="llama"))
    tensors = load_file(base / "model.safetensors")
    projector = {
        name: tensors.pop(name).clone() for name in list(tensors) if "mm_projector" in name
    }
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, base / "model.safetensors"
    )
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()},
        folder / "non_lora_trainables.bin",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "lora_alpha": 4,
                "r": 2,
                "base_model_name_or_path": "lmsys/some-vicuna",
            }
        )
    )
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {
        f"{query}.lora_A.weight": torch.ones(2, 64),
        f"{query}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(halves, folder / "adapter_model.safetensors")
    return {"weights": folder, "model_base": base, "vision_tower": whole["vision_tower"]}


def test_a_lora_alone_asks_for_its_base(lora, capsys):
    """A LoRA alone would be called damaged, rather than in need of its base."""
    status, out = run(capsys, lora["weights"])
    assert status == 1
    assert "is a LoRA adapter alone" in out
    assert "lmsys/some-vicuna" in out
    assert "--model-base" in out
    report = inspect.inspect_folder(lora["weights"])
    assert report.parts["adapter"] == {"tensors": 2, "parameters": 256}
    assert report.parts["projector"]["tensors"] == 4


def test_a_lora_with_its_base_is_whole(lora, capsys):
    """A LoRA with its base would still be called incomplete, or pass without its tower."""
    status, out = run(
        capsys,
        lora["weights"],
        "--model-base",
        lora["model_base"],
        "--vision-tower",
        lora["vision_tower"],
    )
    assert status == 0, out
    assert f"is a LoRA adapter, on the base in {lora['model_base']}" in out
    assert "changes 1 weights" in out
    assert opens(**lora)
    assert run(capsys, lora["weights"], "--model-base", lora["model_base"])[0] == 1


def test_a_projector_alone_needs_a_language_model(lora):
    """A projector alone would be called a whole model, or not be recognised."""
    names = {"adapter_config.json", "adapter_model.safetensors"}
    for name in names:
        (lora["weights"] / name).unlink()
    rest = lora["weights"] / "non_lora_trainables.bin"
    projector = torch.load(rest)
    torch.save(
        {name.removeprefix("base_model.model."): projector[name] for name in projector}, rest
    )
    rest.rename(lora["weights"] / "mm_projector.bin")
    alone, whole = (
        inspect.inspect_folder(lora["weights"]),
        inspect.inspect_folder(lora.pop("weights"), **lora),
    )
    assert alone.dialect == "a projector from pre-training alone, without its base"
    assert not alone.loadable
    assert whole.problems == []
    assert whole.loadable
    assert whole.parts["projector"] == alone.parts["projector"] != {"tensors": 0, "parameters": 0}


def test_files_of_pytorch_are_counted_too(folder, tmp_path):
    """A folder with pytorch_model.bin alone would seem empty."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    before = inspect.inspect_folder(folder)
    (folder / "model.safetensors").unlink()
    after = inspect.inspect_folder(folder)
    assert after.loadable
    assert opens(folder)
    assert (after.parts, after.dtypes, after.unneeded) == (
        before.parts,
        before.dtypes,
        before.unneeded,
    )


# --- broken folders: inspect says no where load does, and says why --------------------------------


def _widen(folder):
    change_json(folder / "config.json", lambda c: c["text_config"].update(intermediate_size=97))


def _take(name):
    return lambda folder: change_weights(folder, lambda tensors: tensors.pop(name))


def _take_part(prefix):
    def damage(folder):
        change_weights(
            folder,
            lambda tensors: [
                tensors.pop(name) for name in list(tensors) if name.startswith(prefix)
            ],
        )

    return damage


DAMAGES = {
    "config.json": (lambda f: (f / "config.json").unlink(), "config.json: not found"),
    "config.json is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "wrong width": (_widen, "up_proj.weight has shape [96, 64], config.json expects [97, 64]"),
    "tokenizer.model": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model: not found; copy tokenizer.model"),
    "tokenizer.model is none": (lambda f: (f / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 9), "truncated"),
    "a tensor less": (_take(QUERY), "missing tensor: language_model.layers.1.self_attn.q_proj.weight"),
    "a tensor more": (
        lambda f: change_weights(f, lambda t: t.update(odd=torch.ones(1))), "not a part of this model: odd",
    ),
    "quantised": (
        lambda f: change_weights(f, lambda t: t.update({QUERY: t[QUERY].char()})), "release that is not quantised",
    ),
    "no projector": (_take_part("multi_modal_projector."), "missing: projector; get it with: hf download llava-hf/"),
    "no tower": (_take_part("vision_tower."), "missing: vision tower; get it with: hf download openai/clip-vit"),
    "no language": (_take_part("language_model."), "missing: language model; get it with: hf download llava-hf/"),
    "pictures": (
        lambda f: change_json(f / "preprocessor_config.json", lambda c: c.update(crop_size=57)), "has image_size 56",
    ),
    "vocabulary": (
        lambda f: change_json(f / "config.json", lambda c: c["text_config"].update(vocab_size=400)), "has 440 pieces",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_load_refuses_is_refused_with_a_reason(folder, capsys, damage):
    """A folder that load refuses would be called sound, or one damage hide all the rest."""
    assert opens(folder)
    assert run(capsys, folder)[0] == 0
    harm, sentence = DAMAGES[damage]
    harm(folder)
    assert not opens(folder)
    status, out = run(capsys, folder)
    assert status == 1
    assert sentence in out.partition("it cannot be opened as it is:")[2]
    # And the rest is still described.
    assert out.count("llava_v1") == 1
    if "tokenizer" not in damage:
        assert "440 pieces, legacy false; added tokens: <image> 440, <pad> 441" in out
    if "config" not in damage:
        assert "  bfloat16 " in out


@pytest.mark.parametrize("part", ["", "linear_1.weight"], ids=["projector", "one tensor"])
def test_a_part_that_cannot_be_read_is_not_called_missing(folder, part):
    """Tensors of a dtype that we do not read would be called missing."""
    name = f"multi_modal_projector.{part}"
    change_weights(
        folder, lambda ts: ts.update({n: t.char() for n, t in ts.items() if n.startswith(name)})
    )
    (problem,) = inspect.inspect_folder(folder).problems
    assert "use a release that is not quantised" in problem


@pytest.mark.parametrize(
    "harmless", ["generation_config.json", "preprocessor_config.json", "tokenizer_config.json"]
)
def test_what_load_does_without_is_no_problem(folder, capsys, harmless):
    """A file that load can do without would make the folder count as broken."""
    (folder / harmless).unlink()
    assert opens(folder)
    status, out = run(capsys, folder)
    assert status == 0
    assert out.count("missing") == 1


def test_a_missing_and_a_damaged_shard_are_both_named_and_the_rest_counted(tmp_path, write_dialect):
    """Only the first bad shard would be named, and the next after another download."""
    folder = write_dialect("hub", tmp_path, shards=4)["weights"]
    whole = inspect.inspect_folder(folder)
    first, second, *rest = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:1000])
    report = inspect.inspect_folder(folder)
    assert not report.loadable
    assert len(report.problems) == 2
    assert f"{first.name}: not found; download this file" in report.problems[0]
    assert f"{second.name}: truncated" in report.problems[1]
    left = {name: tensor for path in rest for name, tensor in load_file(path).items()}
    assert sum(part["tensors"] for part in report.parts.values()) == len(left)
    assert report.memory == whole.memory


def test_many_problems_are_cut_for_a_person_and_whole_in_json(folder, capsys):
    """A wrong config would print hundreds of lines, or --json cut them as well."""
    change_json(folder / "config.json", lambda c: c["text_config"].update(hidden_size=32))
    out = run(capsys, folder)[1]
    assert out.count("has shape") == 8
    misshapen = json.loads(run(capsys, folder, "--json")[1])["misshapen"]
    assert f"and {len(misshapen) - 8} more like it" in out


# --- the command line -----------------------------------------------------------------------------


def test_json_is_one_object_with_everything(folder, capsys):
    """--json would show another prompt than the one that load makes."""
    status, out = run(capsys, folder, "--json", "--template", "vicuna_v1", "--system", "Be brief.")
    assert status == 0
    found = json.loads(out)
    assert found["loadable"] is True
    assert found["template"]["name"] == "vicuna_v1"
    assistant = minillava.load(folder, device="cpu", template="vicuna_v1")
    assert found["template"]["prompt"] == assistant.prompt(
        minillava.prompt.DEFAULT_PROMPT, system="Be brief."
    )
    assert found["tokenizer"] == {
        "pieces": 440,
        "legacy": False,
        "added": {"<image>": 440, "<pad>": 441},
    }
    assert found["network"]["positions_per_picture"] == 16
    assert found["picture"] == {"side": 56, "aspect": "pad"}


def test_keys_lists_every_tensor_once(folder, capsys):
    """--keys would leave a tensor out, or show it under another's name."""
    out = run(capsys, folder, "--keys")[1]
    for name, tensor in load_file(folder / "model.safetensors").items():
        (line,) = [
            words for line in out.splitlines() if name in (words := re.split(r" {2,}", line))[1:]
        ]
        if line[0] != "(not needed)":
            assert line[2:] == [str(list(tensor.shape)), "float32", "model.safetensors"]
            assert line[0].split(".")[-2:] == name.split(".")[-2:]
    assert f"language_model.layers.1.self_attn.q_proj.weight  {QUERY} " in re.sub(
        r" +(?= {2})", "", out
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a", "-m", "b"], "are the same"),
        (["a", "-i", "x.png"], "give both"),
        (["a", "b"], "unrecognized"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, complaint):
    """Two folders or a stray word would be accepted, and one of them ignored."""
    with pytest.raises(SystemExit) as caught:
        enter("inspect", arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    """A mistyped folder would be described as an empty one."""
    assert enter("inspect", [str(tmp_path / "no")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")


# --- the doctor -----------------------------------------------------------------------------------


def visit(capsys, folder, *arguments) -> tuple[int, dict[str, dict]]:
    """Exit status, and check -> finding; on a CPU, in float32 unless said otherwise."""
    status, out = run(
        capsys, folder, "--doctor", "--json", "--device", "cpu", "--dtype", "float32", *arguments
    )
    return status, {finding["check"]: finding for finding in json.loads(out)["doctor"]}


def failed(found: dict[str, dict]) -> list[str]:
    return [check for check, finding in found.items() if finding["status"] == doctor.FAILED]


def test_it_says_what_holds_of_bits_on_this_machine(capsys):
    """Of every layer of the model and of its attention, as they would compute."""
    _, found = visit(capsys, WEIGHTS, "--dtype", "bfloat16")
    claimed = processor.SAME_ROWS.get(processor.kind(), {}).get("bfloat16", 1)
    figures = found["same bits"]["figures"]
    assert claimed <= figures["products"] <= figures["most"]
    assert 1 <= figures["attention"] <= figures["most"]
    assert f"up to {figures['products']} row(s) of products" in found["same bits"]["text"]
    assert found["environment"]["figures"]["kind"] == processor.kind()


def test_a_healthy_model_passes_every_check(capsys):
    """The doctor would raise a false alarm on the bundled model."""
    status, found = visit(capsys, WEIGHTS)
    assert status == 0
    assert {finding["status"] for finding in found.values()} == {doctor.OK}
    assert list(found) == [
        "environment", "device and dtype", "memory", "weights", "same bits", "eager and fused attention", "cache and no cache",
        "blind test",
    ]  # fmt: skip
    assert found["eager and fused attention"]["figures"]["relative_difference"] > 0
    distances = found["blind test"]["figures"]["total_variation"]
    # it says yes to one, no to others
    assert min(distances["picture and black"], distances["picture and noise"]) > 0.5
    assert torch.__version__ in found["environment"]["text"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_weights_pass_in_every_dtype(capsys, reference, dtype):
    """A half-precision model's rounding would be called a fault."""
    status, found = visit(capsys, reference / "grouped", "--dtype", dtype)
    assert (status, failed(found)) == (0, [])
    slow = dtype == "float16"
    assert found["device and dtype"]["status"] == (doctor.WARNING if slow else doctor.OK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_blind_model_fails_the_blind_test_and_no_other(folder, capsys, dtype):
    """A model that ignores its picture would be called healthy."""
    change_weights(folder, lambda tensors: tensors[PROJECTOR].zero_())
    status, found = visit(capsys, folder, "--dtype", dtype)
    assert (status, failed(found)) == (1, ["blind test"])
    assert "IGNORES THE PICTURE" in found["blind test"]["text"]
    assert max(found["blind test"]["figures"]["total_variation"].values()) == 0


def test_one_nan_is_found_and_named(folder, capsys):
    """A NaN in one weight would be found in the answers only, without its tensor's name."""
    change_weights(folder, lambda tensors: tensors[QUERY][3, 5].fill_(math.nan))
    status, out = run(capsys, folder, "--doctor", "--device", "cpu", "--dtype", "float32")
    assert status == 1
    assert (
        "FAILED   weights: NaN or infinity in language_model.layers.1.self_attn.q_proj.weight:"
        in out
    )
    assert "FAILED   answer: the logits are not finite" in out


def test_a_number_too_large_for_the_dtype_is_found(folder, capsys):
    """A weight beyond float16's range would pass, and the answers be NaN."""
    change_weights(folder, lambda tensors: tensors[PROJECTOR][0, 0].fill_(1e6))
    assert failed(visit(capsys, folder)[1]) == []
    assert "weights" in failed(visit(capsys, folder, "--dtype", "float16")[1])


def test_a_wrong_attention_is_found(capsys, reference, monkeypatch):
    """An attention that computes something else would pass the doctor."""
    right = minillava.attention.eager
    monkeypatch.setitem(
        doctor.ATTENTION, "eager", lambda q, k, v, *rest: right(q, k * 1.5, v, *rest)
    )
    assert "eager and fused attention" in failed(visit(capsys, reference / "plain")[1])


def test_a_wrong_cache_is_found(capsys, reference, monkeypatch):
    """A cache that mixes up its values would pass the doctor."""
    right = KVCache.update

    def wrong(self, layer, k, v):
        keys, values = right(self, layer, k, v)
        return keys, values.flip(2) if k.shape[2] == 1 else values

    monkeypatch.setattr(KVCache, "update", wrong)
    assert failed(visit(capsys, reference / "plain")[1]) == ["cache and no cache"]


def test_a_black_picture_looks_like_a_black_one(capsys, tmp_path, reference):
    """A picture that is black itself would make the model count as blind."""
    minillava.image.Image.new("RGB", (56, 56)).save(tmp_path / "black.png")
    status, found = visit(capsys, reference / "plain", "--image", tmp_path / "black.png")
    assert (status, found["blind test"]["status"]) == (0, doctor.WARNING)
    assert "cannot tell picture and black apart" in found["blind test"]["text"]


def test_attention_is_put_back(reference):
    """After an error the model would go on with the attention that was being tested."""
    model = minillava.load(reference / "plain", device="cpu").model
    before = [vars(module).get("attend") for module in model.modules()]
    # the language model, two blocks of the tower
    assert sum(attend is not None for attend in before) == 3
    with pytest.raises(ZeroDivisionError), doctor.attending(model, minillava.attention.eager):
        assert {vars(m)["attend"] for m in model.modules() if "attend" in vars(m)} == {
            minillava.attention.eager
        }
        raise ZeroDivisionError
    assert [vars(module).get("attend") for module in model.modules()] == before


def test_total_variation_of_known_distributions():
    """Logits that differ by a constant, which say the same, would count as different."""
    one, other = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert doctor.total_variation(one.log(), other.log()) == pytest.approx(0.5)
    assert doctor.total_variation(one.log(), one.log() + 7) <= gamma(
        8, torch.float32
    )  # of numbers below 1


def test_the_rule_of_the_blind_test():
    """Three pictures whose first logit differs by these steps."""

    def status(black: float, noise: float, rounding: float) -> str:
        shown = {
            "picture": torch.tensor([0.0, 0.0]),
            "black": torch.tensor([black, 0.0]),
            "noise": torch.tensor([noise, 0.0]),
        }
        return doctor.sight(shown, dict.fromkeys(shown, rounding), str).status

    assert status(0.4, 0.8, 0.001) == doctor.OK  # 0.1, 0.19 and 0.09 against 6 times 0.001
    assert status(0.4, 0.8, 0.1) == doctor.FAILED
    assert status(0.4, 0.4, 0.001) == doctor.WARNING  # black and noise
    assert status(0.0, 0.8, 0.001) == doctor.WARNING
    assert status(0.0, 0.0, 0.0) == doctor.FAILED


@pytest.mark.parametrize(
    ("available", "mapped", "status"),
    [
        (120, False, "ok"),
        (None, False, "ok"),
        (110, False, "warning"),
        (90, True, "warning"),
        (90, False, "FAILED"),
    ],
)
def test_memory_is_weighed(monkeypatch, available, mapped, status):
    """A model that does not fit would be opened, or one that fits be refused."""
    monkeypatch.setattr(doctor, "available_memory", lambda device: available)
    assert doctor.memory(100, 20, "cpu", mapped).status == status


def test_a_model_that_does_not_fit_is_not_opened(capsys, reference, monkeypatch):
    """The doctor would fill the memory with a model that it knows is too large."""
    monkeypatch.setattr(doctor, "available_memory", lambda device: 1000)
    status, found = visit(capsys, reference / "plain", "--dtype", "float64")
    assert (status, list(found)) == (1, ["environment", "device and dtype", "memory"])
    count = sum(
        part["parameters"] for part in inspect.inspect_folder(reference / "plain").parts.values()
    )
    assert found["memory"]["figures"]["weights"] == 8 * count


def test_the_doctor_does_not_open_what_is_not_whole(folder, capsys):
    """A folder without its tokenizer would end the doctor with a traceback."""
    (folder / "tokenizer.model").unlink()
    status, found = visit(capsys, folder)
    assert (status, failed(found)) == (1, ["opening"])
