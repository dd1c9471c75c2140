"""Weights that other programs quantised: refused as quantised, by whose hand, and with a step that
helps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minillava
from minillava.files.tensors import BIN_NAME, SINGLE_NAME
from minillava.inspection.report import inspect_folder

LAYERS = "language_model.model.layers."


@pytest.fixture
def folder(reference, tmp_path) -> Path:
    return shutil.copytree(reference / "tied", tmp_path / "weights")


def state(folder: Path, config: dict | None, config_name: str = "config.json") -> None:
    path = folder / config_name
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(raw | (config or {})), encoding="utf-8")


def pack(folder: Path, parts, to: str = SINGLE_NAME) -> None:
    """Every linear layer of the language model becomes what `parts(module, N, C)` says."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}
    for name in [n for n in tensors if n.startswith(LAYERS) and n.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        tensors |= {
            f"{name.removesuffix('.weight')}{end}": t for end, t in parts(rows, columns).items()
        }
    (folder / SINGLE_NAME).unlink()
    torch.save(tensors, folder / to) if to == BIN_NAME else save_file(tensors, folder / to)


def zeros(*shape: int, dtype=torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16)


def awq(n: int, c: int) -> dict:
    return {".qweight": zeros(c, n // 8), ".qzeros": zeros(1, n // 8), ".scales": half(1, n)}


def gptq(n: int, c: int) -> dict:
    return {
        ".qweight": zeros(c // 8, n),
        ".qzeros": zeros(1, n // 8),
        ".scales": half(1, n),
        ".g_idx": zeros(c),
    }


def bits4(n: int, c: int) -> dict:
    state = {
        ".weight.quant_map": half(16).float(),
        ".weight.quant_state.bitsandbytes__nf4": zeros(9, dtype=torch.uint8),
    }
    return {
        ".weight": zeros(n * c // 2, 1, dtype=torch.uint8),
        ".weight.absmax": half(n * c // 64).float(),
        **state,
    }


def bits4_in_halves(n: int, c: int) -> dict:
    """bnb_4bit_quant_storage: the packed numbers under the name of a dtype that weights have."""
    return bits4(n, c) | {".weight": half(n * c // 4, 1)}


def bits8(n: int, c: int) -> dict:
    return {".weight": zeros(n, c, dtype=torch.int8), ".SCB": half(n).float()}


def fp8(n: int, c: int) -> dict:
    return {
        ".weight": half(n, c).to(torch.float8_e4m3fn),
        ".weight_scale": half(n, 1),
        ".input_scale": half(1),
    }


def packed(n: int, c: int) -> dict:
    return {
        ".weight_packed": zeros(n, c // 8),
        ".weight_scale": half(n, 1),
        ".weight_shape": zeros(2),
    }


def mlx(n: int, c: int) -> dict:
    return {
        ".weight": zeros(n, c // 8).view(torch.uint32),
        ".scales": half(n, 1),
        ".biases": half(n, 1),
    }


def hqq(n: int, c: int) -> dict:
    return {
        ".W_q": zeros(n * c // 2, 1, dtype=torch.uint8),
        ".scale": half(n, 1),
        ".zero": half(n, 1),
    }


def quanto(n: int, c: int) -> dict:
    return {
        ".weight._data": zeros(n, c, dtype=torch.int8),
        ".weight._scale": half(n, 1),
        ".input_scale": half(1),
    }


def method(name: str, **more) -> dict:
    return {"quantization_config": {"quant_method": name, **more}}


@pytest.mark.parametrize(
    ("parts", "config", "by"),
    [
        (awq, method("awq", bits=4), "awq"),
        (awq, None, "AWQ"),
        (gptq, method("gptq", bits=4), "gptq"),
        (gptq, None, "GPTQ"),
        (bits4, method("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
        (bits4, None, "bitsandbytes"),
        (bits4_in_halves, method("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
        (bits8, method("bitsandbytes", load_in_8bit=True), "bitsandbytes"),
        (bits8, None, "bitsandbytes"),
        (fp8, method("fbgemm_fp8"), "fbgemm_fp8"),
        (fp8, None, "FP8"),
        (packed, method("compressed-tensors"), "compressed-tensors"),
        (packed, None, "compressed-tensors"),
        (mlx, {"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        (mlx, None, "MLX"),
        (hqq, method("hqq"), "hqq"),
        (hqq, None, "HQQ"),
        (quanto, method("quanto"), "quanto"),
        (lambda n, c: {".weight": zeros(n, c, dtype=torch.int8), ".weight_scales": half(n)}, method("eetq"), "eetq"),
        (lambda n, c: {".codes": zeros(n, c // 8, 1, dtype=torch.int16), ".codebooks": half(1, 256, 1, 8),
                       ".scales": half(n, 1, 1, 1)}, method("aqlm"), "aqlm"),
        (lambda n, c: {".B": zeros(c // 16, n), ".s": half(1, n)}, None, "Marlin"),
        (lambda n, c: {".compressed": half(9), ".bitmask": zeros(n, c // 8, dtype=torch.uint8)}, None, "compressed"),
        (lambda n, c: {".dense_weights": zeros(9, dtype=torch.int64), ".row_offsets": zeros(n)}, None, "SpQR"),
        (lambda n, c: {".weight": zeros(n, c // 2, dtype=torch.uint8), ".weight_scale_2": half(1),
                       ".weight_scale": half(n, c // 16).to(torch.float8_e4m3fn)}, None, "NVFP4"),
        (lambda n, c: {".weight": half(n, c), ".weight_quantizer._amax": half(1)}, None, "ModelOpt"),
        (lambda n, c: {".weight": half(n, c), ".k_scale": half(1)}, None, "FP8"),
        (lambda n, c: {"._weight_qdata": zeros(n, c, dtype=torch.int8), "._weight_scale": half(n)}, None, "torchao"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", [SINGLE_NAME, BIN_NAME])
@pytest.mark.slow
def test_what_others_quantised_is_refused_as_that(folder, parts, config, by, file):
    """They were called a wrong config.json, which nobody could mend."""
    pack(folder, parts, file)
    state(folder, config)
    with pytest.raises(
        ValueError, match=f"is quantised by .*{by}.* use a release that is not quantised"
    ) as caught:
        minillava.load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    report = inspect_folder(folder)
    assert report.problems == [str(caught.value)]
    assert report.dtypes


def test_a_stated_method_may_stand_beside_config_json_or_in_its_text_part(folder):
    """A quantised checkpoint whose method stands elsewhere than in config.json's first level would
    give a list of unknown tensors."""
    pack(folder, awq)
    state(folder, {"bits": 4}, "quantize_config.json")
    assert "quantised by GPTQ" in refusal(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state(folder, {"text_config": raw["text_config"] | method("awq")})
    assert "quantised by awq" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e5m2])
def test_packed_weights_of_a_program_nobody_knows_are_quantised_all_the_same(folder, dtype):
    """SmoothQuant's int8 weights with `a` and `b` were reported as names that do not fit."""
    pack(
        folder, lambda n, c: {".weight": torch.zeros(n, c).to(dtype), ".a": half(1), ".b": half(1)}
    )
    message = refusal(folder)
    assert "is quantised (" in message and f"weight is {str(dtype)[6:]})" in message
    assert "\n" not in message and inspect_folder(folder).problems == [message]
    state(folder, {"quantization": {"quant_algo": "W8A8"}}, "hf_quant_config.json")
    assert "is quantised by ModelOpt" in refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        minillava.load(folder, device="cpu")
    return str(caught.value)


@pytest.mark.parametrize("name", ["bitsandbytes", "gptq"])
def test_a_config_alone_does_not_make_weights_quantised(folder, reference, name):
    """QLoRA merged into plain weights leaves the key in config.json."""
    state(folder, method(name, load_in_4bit=True))
    found = minillava.load(folder, device="cpu", dtype="float32").model.state_dict()
    plain = minillava.load(reference / "tied", device="cpu", dtype="float32").model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())


def test_gguf_files_are_named(folder):
    """A folder of llama.cpp's files would be called empty, which sends a user to download it
    again."""
    (folder / SINGLE_NAME).unlink()
    (folder / "ggml-model-q4_k.gguf").write_bytes(b"GGUF")
    assert "is quantised by llama.cpp (holds ggml-model-q4_k.gguf)" in refusal(folder)
    assert any("llama.cpp" in problem for problem in inspect_folder(folder).problems)


def test_a_bin_of_other_objects_is_quantised_where_the_folder_says_so(folder):
    """HQQ and torchao keep more than tensors in a .bin, which is not opened."""
    tensors = load_file(folder / SINGLE_NAME)
    (folder / SINGLE_NAME).unlink()
    torch.save({**tensors, f"{LAYERS}0.self_attn.q_proj": {"W_q": zeros(4)}}, folder / BIN_NAME)
    assert "expected a plain tensor" in refusal(folder)
    state(folder, method("hqq"))
    assert "is quantised by hqq" in refusal(folder)
