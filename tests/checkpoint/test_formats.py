"""The layouts that fine-tunes come in: .bin files, a projector alone, LoRA adapters, tokens added
to the vocabulary."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import llama_json
import pytest
import relatives
import torch
from bounds import assert_within, gamma, network
from hf import read_json, write_json
from paths import ROOT
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

import minillava
from minillava.checkpoint import adapter
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.parts import collect_parts
from minillava.checkpoint.stored import StoredWeights
from minillava.cli.doors import enter
from minillava.config import IM_END, IM_PATCH, IM_START, IMAGE_TOKEN_INDEX
from minillava.files.rows import grow_rows
from minillava.files.tensors import BIN_INDEX_NAME, BIN_NAME, SINGLE_NAME, TorchFile
from minillava.inspection.report import inspect_folder
from minillava.tokenizer import Tokenizer

main = partial(enter, "generate")

QUESTION = "What is in this image?"
LAYER = "model.layers.0.self_attn.q_proj"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def release(tmp_path, write_dialect) -> dict[str, Path]:
    """The original's layout: no tower in it. `weights` and `vision_tower` for minillava.load."""
    return write_dialect("original-bare", tmp_path / "release")


@pytest.fixture
def picture(reference) -> Path:
    return reference / "pictures" / "landscape.png"


@pytest.fixture
def base(release, tmp_path) -> Path:
    """A plain Llama, as a Vicuna is: the release without its projector."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = weights_of(release["weights"])
    store({name: w for name, w in tensors.items() if "mm_projector" not in name}, folder)
    shutil.copy(release["weights"] / "tokenizer.model", folder)
    config = {
        k: v
        for k, v in read_json(release["weights"] / "config.json").items()
        if not k.startswith("mm_")
    }
    write_json(
        {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        folder / "config.json",
    )
    return folder


@pytest.fixture
def pretrain(release, tmp_path) -> Path:
    """What LLaVA's first stage saves: a projector and a configuration."""
    folder = tmp_path / "pretrain"
    folder.mkdir()
    shutil.copy(release["weights"] / "config.json", folder)
    tensors = weights_of(release["weights"])
    torch.save(
        {name: w for name, w in tensors.items() if "mm_projector" in name},
        folder / "mm_projector.bin",
    )
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in load_file(folder / SINGLE_NAME).items()}


def store(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file({name: w.contiguous() for name, w in tensors.items()}, folder / SINGLE_NAME)


def load(weights: Path, **options):
    return minillava.load(weights, device="cpu", dtype="float32", attention="eager", **options)


def logits(assistant, picture: Path) -> torch.Tensor:
    spliced = assistant.prepare(picture, assistant.prompt(QUESTION))
    with torch.no_grad():
        return assistant.model.language_model(spliced.embeds, spliced.padding_mask).logits


def assert_same_logits(found: torch.Tensor, expected, picture: Path) -> None:
    """Within what float32 allows the expected model, whose weights may differ in their last digit
    from those that made `found`: less than a layer's sums may. `expected` is made float64."""
    expected.model.double()
    assert_within(
        found, network(expected.model, lambda: {"logits": logits(expected, picture)})["logits"]
    )


def assert_merged(found: torch.Tensor, expected: torch.Tensor, adapter: Path, what=None) -> None:
    """Two float32 sums W + scale · B·A, each in an order of its own: r products of numbers as large
    as the adapter's largest, the scale and its own rounding, and the sum with W."""
    config = read_json(adapter / "adapter_config.json")
    file = next(adapter.glob("adapter_model.*"))
    tensors = torch.load(file) if file.suffix == ".bin" else load_file(file)
    a, b = (
        max(float(w.abs().max()) for name, w in tensors.items() if kind in name)
        for kind in (".lora_A", ".lora_B")
    )
    rank = config["r"]
    largest = (
        config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank) * rank * a * b
    )
    torch.testing.assert_close(
        found,
        expected,
        rtol=2 * gamma(1, torch.float32),
        atol=2 * gamma(rank + 3, torch.float32) * largest,
        msg=what,
    )


def change(path: Path, **fields) -> None:
    write_json({**read_json(path), **fields}, path)


# --- .bin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one file", "shards", "saved before PyTorch 1.6"])
def test_bin_files_hold_the_same_model(release, picture, form):
    """Older releases have .bin files only: they would be refused, or differ from the safetensors of
    the same weights."""
    expected = logits(load(**release), picture)
    folder = release["weights"]
    tensors = weights_of(folder)
    (folder / SINGLE_NAME).unlink()
    if form == "shards":
        names, placed = sorted(tensors), {}
        for i in range(2):
            file = f"pytorch_model-{i + 1:05}-of-00002.bin"
            torch.save({name: tensors[name] for name in names[i::2]}, folder / file)
            placed |= dict.fromkeys(names[i::2], file)
        write_json({"metadata": {}, "weight_map": placed}, folder / BIN_INDEX_NAME)
    else:
        torch.save(tensors, folder / BIN_NAME, _use_new_zipfile_serialization=form == "one file")
    assert torch.equal(logits(load(**release), picture), expected)


def test_bin_files_stay_memory_mapped(tmp_path):
    """What is written to the file shows in the tensor: nothing was copied when it was opened."""
    path = tmp_path / BIN_NAME
    torch.save({"w": torch.full((1000,), 3.0)}, path)
    tensor = TorchFile(path).read("w")
    assert tensor.eq(3).all()
    content = path.read_bytes()
    at = content.index(torch.full((1000,), 3.0).numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(torch.full((1000,), 5.0).numpy().tobytes())
    assert tensor.eq(5).all()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(release, tmp_path, zipped):
    """Loading a downloaded .bin file would run whatever code its author put into it."""
    folder, trace = release["weights"], tmp_path / "was-here"
    torch.save(
        {**weights_of(folder), "evil": Evil(trace)},
        folder / BIN_NAME,
        _use_new_zipfile_serialization=zipped,
    )
    (folder / SINGLE_NAME).unlink()
    with pytest.raises(
        ValueError,
        match=r"holds more than tensors, namely \w+\.mkdir, which opening it would run: refused",
    ) as error:
        load(**release)
    assert str(error.value).startswith(f"{folder / BIN_NAME}: ")
    assert len(str(error.value).splitlines()) == 1
    assert not trace.exists()
    torch.load(folder / BIN_NAME, weights_only=False)  # the pickle works
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(2)], "holds a list, expected tensors by name"),
        ({"w": 3}, "w is int, expected a plain tensor"),
        ({"optimizer": {"w": torch.zeros(2)}}, "optimizer is dict, expected a plain tensor"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "w is torch.sparse_coo on cpu"),
        ({3: torch.zeros(2)}, "holds a dict, expected tensors by name"),
        ({"w": torch.zeros(2, device="meta")}, "w is torch.strided on meta"),
        ("pointer", "is a Git LFS pointer, not the file itself; get that with: git lfs pull"),
        ("truncated", "truncated or not a PyTorch file"),
        ("empty", "truncated or not a PyTorch file"),
        ("text", "truncated or not a PyTorch file"),
    ],
)
def test_a_bin_file_that_is_no_checkpoint_is_refused(tmp_path, content, found):
    """A .bin file of something else, or half a download, would end in a traceback of the
    unpickler."""
    path = tmp_path / BIN_NAME
    if isinstance(content, str):
        torch.save({"w": torch.zeros(1000)}, path)
        whole = path.read_bytes()
        path.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "empty": b"",
                "text": b"<html>not found</html>",
                "pointer": b"version https://git-lfs.github.com/spec/v1",
            }[content]
        )
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=found) as error:
        StoredWeights(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


# --- a projector alone ----------------------------------------------------------------------------


def test_a_projector_and_its_base_make_the_release(release, base, pretrain, picture):
    """A projector put on its base model would give other answers than the release made from
    both."""
    expected = logits(load(**release), picture)
    found = load(pretrain, model_base=base, vision_tower=release["vision_tower"])
    assert torch.equal(logits(found, picture), expected)


def test_parts_that_need_a_base_say_so(pretrain, base, release):
    """A folder of a projector alone would list the whole language model as missing, and a base that
    is not needed would be ignored."""
    with pytest.raises(
        FileNotFoundError, match=r"holds a projector and no language model; .* --model-base"
    ):
        load(pretrain, vision_tower=release["vision_tower"])
    with pytest.raises(
        ValueError,
        match="holds a language model of its own, so --model-base has nothing to complete",
    ):
        load(**release, model_base=base)


def test_a_projector_that_would_stay_random_is_refused(release, base, pretrain):
    """A language model with a LLaVA configuration, and a base with neither projector."""
    tower = release["vision_tower"]
    shutil.copy(release["weights"] / "config.json", base)
    with pytest.raises(
        FileNotFoundError, match="holds no projector, without which the model cannot see"
    ):
        load(base, vision_tower=tower)
    content = torch.load(pretrain / "mm_projector.bin")
    del content["model.mm_projector.2.bias"]
    torch.save(content, pretrain / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"projector\.linear_2\.bias is missing"):
        load(pretrain, model_base=base, vision_tower=tower)


# --- LoRA -----------------------------------------------------------------------------------------


def lora(
    model: dict[str, torch.Tensor], kinds: list[str], rank: int = 3, default: str = ""
) -> dict[str, torch.Tensor]:
    """Random matrices for every layer of these kinds, by PEFT's names."""
    generator, found = torch.Generator().manual_seed(5), {}
    for name, w in model.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in kinds and "vision" not in name:
            prefix = f"base_model.model.{module}"
            found[f"{prefix}.lora_A{default}.weight"] = (
                torch.randn(rank, w.shape[1], generator=generator) * 0.1
            )
            found[f"{prefix}.lora_B{default}.weight"] = (
                torch.randn(w.shape[0], rank, generator=generator) * 0.1
            )
    return found


@pytest.fixture
def write_lora(release, base, tmp_path):
    """`write_lora(config..., default=, file=)`: a folder as LLaVA's LoRA training leaves it, with
    the projector in non_lora_trainables.bin; returns the folder and the weights it stands for."""

    def write(
        default: str = "",
        file: str = "adapter_model.bin",
        rest: str = "base_model.model.",
        **fields,
    ):
        folder, tensors = tmp_path / "lora", weights_of(release["weights"])
        folder.mkdir()
        kinds = ["q_proj", "down_proj"]
        matrices = lora(tensors, kinds, default=default)
        config = {
            "peft_type": "LORA",
            "r": 3,
            "lora_alpha": 6,
            "target_modules": kinds,
            "fan_in_fan_out": False,
        }
        config |= {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "use_rslora": False, **fields}
        write_json(config, folder / "adapter_config.json")
        (torch.save if file.endswith(".bin") else save_file)(matrices, folder / file)
        shutil.copy(release["weights"] / "config.json", folder)
        projector = {rest + name: w for name, w in tensors.items() if "mm_projector" in name}
        torch.save(projector, folder / "non_lora_trainables.bin")
        scale = config["lora_alpha"] / (3**0.5 if config["use_rslora"] else 3)
        for name in tensors:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_%s{default}.weight"
            if key % "A" in matrices:
                tensors[name] = (
                    tensors[name].double()
                    + scale * matrices[key % "B"].double() @ matrices[key % "A"].double()
                ).float()
        return folder, tensors

    return write


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"default": ".default"},
        {"file": "adapter_model.safetensors"},
        {"rest": ""},
        {"rest": "base_model."},
        {"use_rslora": True},
        {"fan_in_fan_out": True},
        {"lora_alpha": 1},
    ],
    ids=str,
)
def test_a_lora_is_its_merged_weights(release, base, write_lora, picture, form):
    """A form in which PEFT or LLaVA saves a LoRA would be scaled or transposed wrongly, and only
    the answers would show it."""
    folder, merged = write_lora(**form)
    found = load(folder, model_base=base, vision_tower=release["vision_tower"])
    store(merged, release["weights"])
    expected = load(**release)
    for (name, ours), (_, theirs) in zip(
        found.model.state_dict().items(), expected.model.state_dict().items(), strict=True
    ):
        assert_merged(ours, theirs, folder, name)
    assert_same_logits(logits(found, picture), expected, picture)


def test_merged_logits_are_those_of_base_and_adapter_path(release, base, write_lora, picture):
    """The adapter as a path of its own beside each layer, added to its output."""
    folder, _ = write_lora()
    merged = logits(load(folder, model_base=base, vision_tower=release["vision_tower"]), picture)
    plain = load(**release)
    matrices = torch.load(folder / "adapter_model.bin")
    assert not torch.allclose(merged, logits(plain, picture), atol=0.1)
    for name, module in plain.model.language_model.named_modules():
        key = f"base_model.model.model.{name}.lora_%s.weight"
        if key % "A" in matrices:
            a, b = matrices[key % "A"], matrices[key % "B"]
            a, b = a.double(), b.double()
            module.register_forward_hook(lambda _, x, out, a=a, b=b: out + x[0] @ a.T @ b.T * 2)
    assert_same_logits(merged, plain, picture)


def test_the_merge_is_rounded_once(release, base, write_lora):
    """At bfloat16 the sum of float32 numbers is rounded, not a sum of rounded numbers."""
    folder, merged = write_lora()
    found = minillava.load(
        folder,
        model_base=base,
        vision_tower=release["vision_tower"],
        device="cpu",
        dtype="bfloat16",
    )
    ours = found.model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(ours, merged[f"{LAYER}.weight"].bfloat16())


def test_an_adapter_goes_on_top_of_a_whole_model(release, base, write_lora, picture):
    """One adapter would give different models by the two ways of loading it."""
    folder, _ = write_lora()
    alone = logits(load(folder, model_base=base, vision_tower=release["vision_tower"]), picture)
    assert torch.equal(logits(load(**release, adapter=folder), picture), alone)


def test_an_adapter_without_a_base_names_it(write_lora, release):
    """A user of an adapter has to learn which model it belongs to."""
    folder, _ = write_lora()
    with pytest.raises(
        FileNotFoundError, match=r"a LoRA adapter and no language model; .*\(lmsys/vicuna-7b-v1.5\)"
    ):
        load(folder, vision_tower=release["vision_tower"])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda m: m.pop(f"base_model.model.{LAYER}.lora_B.weight"), "lora_A.weight, but no lora_B for it"),
        (lambda m: m.update({f"base_model.model.{LAYER}x.lora_A.weight": torch.zeros(3, 4),
                             f"base_model.model.{LAYER}x.lora_B.weight": torch.zeros(4, 3)}),
         "q_projx.weight, which this model does not have"),
        (lambda m: m.update({f"base_model.model.{LAYER}.lora_B.weight": torch.zeros(5, 3)}), r"make \[5, "),
        (lambda m: m.update({f"base_model.model.{LAYER}.lora_B.weight": torch.zeros(5, 2)}), r"expected \[r, C\] and "),
        (lambda m: m.update({"base_model.model.ghost": torch.zeros(2)}), "ghost is not part of this model"),
        (lambda m: [m.pop(f"base_model.model.{LAYER}.lora_{half}.weight") for half in "AB"],
         r"holds no lora_A and lora_B for language_model\.layers\.0\.self_attn\.q_proj\.weight"),
        (lambda m: m.update({"base_model.model.lm_head.weight": torch.zeros(7, 64)}), r"cut the vocabulary from 440 to 7, but it does not hold"),
        (lambda m: m.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 7)}),
         "lora_embedding_A is not supported; merge it with PEFT first"),
        (lambda m: m.clear(), "holds no pair of lora_A and lora_B"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(release, base, write_lora, damage, found):
    """A matrix that fits nowhere would be left out, and the model would answer as if it were not
    fine-tuned."""
    folder, _ = write_lora()
    matrices = torch.load(folder / "adapter_model.bin")
    damage(matrices)
    torch.save(matrices, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=found):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', supported: LORA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"megatron_config": {"a": 1}}, "megatron_config is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters is"),
        ({"kasa_config": {"a": 1}}, "kasa_config is"),
        ({"use_bdlora": {"a": 1}}, "use_bdlora is"),
        ({"use_what_comes_next": True}, "use_what_comes_next is True"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much', expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern is"),
        ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
    ],
)
def test_other_kinds_of_adapter_are_refused(release, base, write_lora, fields, found):
    """Another method than plain LoRA would be merged as plain LoRA, which gives wrong weights
    without an error."""
    folder, _ = write_lora()
    change(folder / "adapter_config.json", **fields)
    with pytest.raises(ValueError, match=found):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "LoftQ", "lora_ga"]
)
def test_a_beginning_that_moved_the_base_is_refused_in_any_spelling(
    release, base, write_lora, start
):
    """LoRA-GA and OLoRA in capitals were opened as plain LoRA: the logits were off by 7."""
    folder, _ = write_lora()
    change(folder / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(
        ValueError,
        match=f"init_lora_weights is '{start}', which also changes the base model; merge",
    ):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


@pytest.mark.parametrize("start", ["tomorrow", 3, ["pissa"]])
def test_a_beginning_that_nobody_knows_is_refused_by_name(release, base, write_lora, start):
    """An initialisation that changes the base model would be merged onto the unchanged one."""
    folder, _ = write_lora()
    change(folder / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(
        ValueError,
        match=r"init_lora_weights is .*, which may change the base model, too; known: true",
    ):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"init_lora_weights": s}
            for s in (True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica")
        ),
        {"eva_config": {"rho": 2.0}},
        {"loftq_config": {}, "use_dora": None, "runtime_config": {"ephemeral_gpu_offload": False}},
    ],
    ids=str,
)
def test_a_beginning_that_left_the_base_alone_is_plain_lora(release, base, write_lora, fields):
    """A plain LoRA would be refused because of a field that changed nothing."""
    folder, merged = write_lora()
    change(folder / "adapter_config.json", **fields)
    found = load(folder, model_base=base, vision_tower=release["vision_tower"]).model.state_dict()
    ours = found["language_model.layers.0.self_attn.q_proj.weight"]
    assert_merged(ours, merged[f"{LAYER}.weight"], folder)


@pytest.mark.parity
def test_the_beginnings_are_those_of_peft():
    """A way to begin that PEFT learns must be sorted into the two lists of checkpoint/adapter.py."""
    config = pytest.importorskip(
        "peft.tuners.lora.config", reason="PEFT is not installed (extra: parity)"
    )
    hint = config.LoraConfig.__dataclass_fields__["init_lora_weights"].type
    words = [word for word in re.findall(r"'(\w+)'|\"(\w+)\"", str(hint)) for word in word if word]
    assert "gaussian" in words
    for word in words:
        assert word.lower() in adapter._BEGAN or word.lower().startswith(adapter._MOVED), word


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_adapter_and_projector_may_be_wrapped_too(release, base, pretrain, write_lora, wrapper):
    """Names with a wrapper would load from model files and be refused in the files of an adapter or
    a projector."""
    lora, _ = write_lora()
    files = {
        lora: ("adapter_model.bin", "non_lora_trainables.bin"),
        pretrain: ("mm_projector.bin",),
    }
    for folder, names in files.items():
        plain = load(
            folder, model_base=base, vision_tower=release["vision_tower"]
        ).model.state_dict()
        # which are mapped from the files below
        plain = {name: tensor.clone() for name, tensor in plain.items()}
        for name in names:
            torch.save(
                {wrapper + key: w for key, w in torch.load(folder / name).items()}, folder / name
            )
        found = load(
            folder, model_base=base, vision_tower=release["vision_tower"]
        ).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_two_files_of_an_adapter_are_told(release, base, write_lora):
    """PEFT reads the safetensors; the .bin may be of another day."""
    folder, _ = write_lora()
    matrices = torch.load(folder / "adapter_model.bin")
    save_file({name: w * 2 for name, w in matrices.items()}, folder / "adapter_model.safetensors")
    with pytest.warns(
        UserWarning, match=r"read from adapter_model\.safetensors, not from adapter_model\.bin"
    ):
        found = load(folder, model_base=base, vision_tower=release["vision_tower"]).model
    (folder / "adapter_model.bin").unlink()
    alone = load(folder, model_base=base, vision_tower=release["vision_tower"]).model
    name = "language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found.state_dict()[name], alone.state_dict()[name])


def test_two_adapters_in_one_file_are_refused(release, base, write_lora):
    """One of two adapters in a file would be merged and the other forgotten."""
    folder, _ = write_lora(default=".default")
    matrices = torch.load(folder / "adapter_model.bin")
    more = {name.replace(".default.", ".second."): w for name, w in matrices.items()}
    torch.save(matrices | more, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="are two adapters; save one of them"):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


def test_a_model_with_an_adapter_beside_it_is_refused(release, write_lora):
    """Whether it is merged already cannot be seen."""
    folder, _ = write_lora()
    shutil.copy(folder / "adapter_config.json", release["weights"])
    with pytest.raises(
        ValueError, match="remove the adapter if it is merged already, else move it"
    ):
        load(**release)


def test_an_adapter_without_configuration_says_which_one_is_missing(write_lora, release, base):
    """Two files of configuration are needed, and an error that names the wrong one sends a user to
    the wrong folder."""
    folder, _ = write_lora()
    (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds no config\.json, and its base .* is not a LLaVA"
    ):
        load(folder, model_base=base, vision_tower=release["vision_tower"])
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json, expected a LoRA"):
        load(**release, adapter=base)


def test_some_layers_are_enough_where_the_configuration_says_so(write_lora, release, base):
    """A LoRA of chosen layers would be refused for lacking the others."""
    folder, _ = write_lora(layers_to_transform=[1])
    matrices = {
        k: w for k, w in torch.load(folder / "adapter_model.bin").items() if ".layers.1." in k
    }
    torch.save(matrices, folder / "adapter_model.bin")
    plain, found = (
        load(**release),
        load(folder, model_base=base, vision_tower=release["vision_tower"]),
    )
    for i, equal in ((0, True), (1, False)):
        ours, theirs = (
            a.model.language_model.layers[i].self_attn.q_proj.weight for a in (found, plain)
        )
        assert torch.equal(ours, theirs) is equal


def test_a_table_of_fewer_rows_is_not_lost_on_a_whole_model(release, write_lora):
    """Only a base grows; a whole model's table that does not fit is an error, never left out."""
    folder, _ = write_lora()
    rest = torch.load(folder / "non_lora_trainables.bin") | {
        f"base_model.model.{TABLE}": torch.zeros(2, 64)
    }
    torch.save(rest, folder / "non_lora_trainables.bin")
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight has shape \[2, 64\], config.json expects"
    ):
        load(**release, adapter=folder)


def test_half_a_lora_run_is_refused(write_lora, base, release):
    """Without one of its two files a fine-tuned model would load as its base."""
    folder, _ = write_lora()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"but no adapter_config\.json"):
        load(folder, model_base=base, vision_tower=release["vision_tower"])
    folder.joinpath("adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_model\.safetensors or adapter_model\.bin"
    ):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "lora_alpha": 5, "target_modules": ["k_proj"], "fan_in_fan_out": True},
        {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"],
         "rank_pattern": {"up_proj": 5}, "alpha_pattern": {"layers.0.mlp.up_proj": 7}},
        {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's own, about transformers
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
def test_equals_peft(base, pretrain, release, tmp_path, settings):
    """Adapter written by PEFT on transformers' Llama; merged by PEFT, and by us."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: parity)")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra: parity)"
    )
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path / "peft"
    model.save_pretrained(folder)
    for name in ("config.json", "mm_projector.bin"):
        shutil.copy(pretrain / name, folder)
    merged = model.merge_and_unload().state_dict()
    checkpoint = collect_parts(Folders(folder, release["vision_tower"], base))
    language = [name for name in checkpoint.tensors if name.startswith("language_model.")]
    assert len(language) == len(merged)
    plain = StoredWeights(base)
    changed = 0
    for name in language:
        rest = name.removeprefix("language_model.")
        theirs = merged[rest if rest.startswith("lm_head") else f"model.{rest}"]
        assert_merged(checkpoint.read(name), theirs, folder, name)
        changed += not torch.equal(plain.read(name), theirs)
    assert changed


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "linear_2"]], ids=str)
def test_equals_peft_on_the_hub_s_llava(reference, tmp_path, targets, picture):
    """README's row for a LoRA on top of a whole model: its tower and projector may have one,
    too."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: parity)")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra: parity)"
    )
    hub = reference / "plain"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(hub, dtype=torch.float32)
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": targets, "modules_to_save": ["lm_head"]}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "peft")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copy(hub / "tokenizer.model", tmp_path / "merged")
    found, expected, plain = (
        load(hub, adapter=tmp_path / "peft"),
        load(tmp_path / "merged"),
        load(hub),
    )
    changed = 0
    for name, theirs in expected.model.state_dict().items():
        assert_merged(found.model.state_dict()[name], theirs, tmp_path / "peft", name)
        changed += not torch.equal(plain.model.state_dict()[name], theirs)
    assert changed >= 4
    assert_same_logits(logits(found, picture), expected, picture)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_equals_peft_where_a_run_added_tokens(reference, tmp_path, picture):
    """Its tables are larger than the base's: it was refused with the advice to use another base,
    and there is none."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: parity)")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra: parity)"
    )
    hub = reference / "plain"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(hub, dtype=torch.float32)
    before = model.config.text_config.vocab_size
    torch.manual_seed(0)
    model.resize_token_embeddings(before + 24)
    settings = {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    }
    model = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    shutil.copy(hub / "tokenizer.model", tmp_path / "merged")
    found, expected = load(hub, adapter=tmp_path / "peft"), load(tmp_path / "merged")
    assert (
        found.model.config.text.vocab_size == expected.model.config.text.vocab_size == before + 24
    )
    for name, theirs in expected.model.state_dict().items():
        assert_merged(found.model.state_dict()[name], theirs, tmp_path / "peft", name)
    assert isinstance(found.ask(picture, QUESTION, max_new_tokens=3), str)
    assert inspect_folder(hub, adapter=tmp_path / "peft").loadable


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_equals_peft_where_a_run_cut_the_tables(reference, tmp_path, picture):
    """transformers' resize_token_embeddings(len(tokenizer)) cuts the hub's padded rows; that was
    refused with the advice to use another base."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: parity)")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra: parity)"
    )
    hub = reference / "plain"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(hub, dtype=torch.float32)
    rows = model.config.text_config.vocab_size - 7  # the pad token goes, too
    model.resize_token_embeddings(rows)
    settings = {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    }
    model = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copy(hub / "tokenizer.model", tmp_path / "merged")
    found, expected = load(hub, adapter=tmp_path / "peft"), load(tmp_path / "merged")
    assert found.model.config.text.vocab_size == expected.model.config.text.vocab_size == rows
    assert found.model.config.pad_token_id < rows
    for name, theirs in expected.model.state_dict().items():
        assert_merged(found.model.state_dict()[name], theirs, tmp_path / "peft", name)
    assert found.ask(picture, QUESTION, max_new_tokens=4) == expected.ask(
        picture, QUESTION, max_new_tokens=4
    )
    assert inspect_folder(hub, adapter=tmp_path / "peft").loadable


@pytest.mark.parametrize("name", [TABLE, HEAD])
def test_one_table_that_was_cut_without_the_other_is_refused(release, base, write_lora, name):
    """Embedding and head of different lengths would fail in the middle of an answer, or never give
    the last tokens."""
    folder, _ = write_lora()
    matrices = torch.load(folder / "adapter_model.bin")
    rows, width = weights_of(release["weights"])[name].shape
    torch.save(
        matrices | {f"base_model.model.{name}": torch.zeros(rows - 1, width)},
        folder / "adapter_model.bin",
    )
    with pytest.raises(
        ValueError, match=f"cut the vocabulary from {rows} to {rows - 1}, but it does not hold"
    ):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


def test_both_tables_of_an_original_may_be_cut(release, base, write_lora):
    """A fine-tuned model with fewer rows than its base would be refused though both of its tables
    agree."""
    folder, _ = write_lora()
    matrices = torch.load(folder / "adapter_model.bin")
    for name in (TABLE, HEAD):
        matrices[f"base_model.model.{name}"] = weights_of(release["weights"])[name][:-1].clone()
    torch.save(matrices, folder / "adapter_model.bin")
    rows = len(weights_of(release["weights"])[TABLE])
    checkpoint = collect_parts(Folders(folder, release["vision_tower"], base), rows)
    assert checkpoint.rows == rows - 1
    for name in ("language_model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert checkpoint.shape(name)[0] == len(checkpoint.read(name)) == rows - 1


@pytest.mark.parametrize("name", [TABLE, HEAD])
def test_one_table_that_grew_without_the_other_is_refused_with_both_numbers(
    release, base, write_lora, name
):
    """A new token would have an embedding and no row of the head, or the other way round."""
    folder, _ = write_lora()
    matrices = torch.load(folder / "adapter_model.bin")
    rows, width = weights_of(release["weights"])[name].shape
    torch.save(
        matrices | {f"base_model.model.{name}": torch.zeros(rows + 8, width)},
        folder / "adapter_model.bin",
    )
    with pytest.raises(
        ValueError, match=f"enlarged the vocabulary from {rows} to {rows + 8}, but it does not hold"
    ):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


def test_a_lora_of_a_larger_head_says_what_its_run_did(release, base, write_lora):
    """A mismatch of shapes does not tell a user that the training run enlarged the vocabulary."""
    folder, _ = write_lora()
    matrices = torch.load(folder / "adapter_model.bin")
    rows, width = weights_of(release["weights"])[HEAD].shape
    key = "base_model.model.lm_head.lora_%s.weight"
    more = {key % "A": torch.zeros(2, width), key % "B": torch.zeros(rows + 8, 2)}
    torch.save(matrices | more, folder / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=f"enlarged the vocabulary from {rows} to {rows + 8}; merge it with PEFT"
    ):
        load(folder, model_base=base, vision_tower=release["vision_tower"])


# --- what PEFT and torch.nn.utils leave in the names of a whole model ------------------------------


def renamed_copy(reference, tmp_path, change) -> Path:
    """`plain` with tensors as `change` names them: old name, tensor -> new name and tensor."""
    folder = shutil.copytree(reference / "plain", tmp_path / "renamed")
    tensors = dict(
        pair for n, t in load_file(folder / SINGLE_NAME).items() for pair in change(n, t)
    )
    (folder / SINGLE_NAME).unlink()
    save_file(tensors, folder / SINGLE_NAME)
    return folder


def as_peft_holds_it(name, tensor):
    head, _, rest = name.partition("multi_modal_projector.")
    if rest:
        module = f"{head}multi_modal_projector."
        yield f"{module}original_module.{rest}", torch.zeros_like(tensor)
        yield f"{module}modules_to_save.default.{rest}", tensor
    else:
        yield name.replace("q_proj.", "q_proj.base_layer."), tensor


def test_a_model_saved_inside_peft_is_the_model(reference, tmp_path):
    """A LoRA merged in place and saved without unload() keeps PEFT's names; that it was merged, no
    tensor says."""
    with pytest.warns(UserWarning, match="base_layer.*, as PEFT names .* not merged before"):
        found = load(renamed_copy(reference, tmp_path, as_peft_holds_it)).model.state_dict()
    plain = load(reference / "plain").model.state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_two_modules_that_peft_keeps_are_not_one(reference, tmp_path):
    """One of two saved projectors would overwrite the other without an error."""

    def twice(name, tensor):
        yield name, tensor
        if "projector" in name:
            head, _, rest = name.rpartition("projector.")
            yield f"{head}projector.modules_to_save.other.{rest}", tensor.clone()

    with pytest.raises(ValueError, match=r"are both projector\S+; remove one"):
        load(renamed_copy(reference, tmp_path, twice))


@pytest.mark.parametrize(
    "end", ["parametrizations.weight.original", "weight_orig", "weight_mask", "weight_g"]
)
def test_a_weight_that_is_computed_from_others_is_one_line(reference, tmp_path, end):
    """A pruned or parametrised weight would be called missing, once for each layer."""

    def change(name, tensor):
        yield name.replace("q_proj.weight", f"q_proj.{end}"), tensor

    with pytest.raises(ValueError, match=rf"{end}\); save the model after") as caught:
        load(renamed_copy(reference, tmp_path, change))
    assert "\n" not in str(caught.value)


# --- one file that is not read as it lies there ---------------------------------------------------


def test_a_bin_with_a_moving_average_says_which_is_read(reference, tmp_path):
    """A user would not learn whether the trained weights or their moving average answer."""
    folder = shutil.copytree(reference / "plain", tmp_path / "model")
    tensors = load_file(folder / SINGLE_NAME)
    (folder / SINGLE_NAME).unlink()
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    optimizer = {"state": {0: {"step": torch.tensor(1)}}, "param_groups": []}
    torch.save({"ema": other, "model": tensors, "optimizer": optimizer}, folder / BIN_NAME)
    assert inspect_folder(folder).notes == [
        f"{folder / BIN_NAME}: weights are read from its model, not from ema"
    ]
    with pytest.warns(UserWarning, match="read from its model, not from ema"):
        found = load(folder).model.state_dict()
    assert torch.equal(
        found["language_model.norm.weight"], tensors["language_model.model.norm.weight"]
    )


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("model.fp16.safetensors", "rename it to model.safetensors"),
        ("my-llava.safetensors", "rename it to model.safetensors"),
        ("pytorch_model.fp16.bin", "rename it to pytorch_model.bin"),
        ("model.pt", "rename it to pytorch_model.bin"),
        ("consolidated.safetensors", "the layout of Meta and Mistral"),
        ("consolidated.00.pth", "the layout of Meta and Mistral"),
        ("model-00001-of-00002.safetensors", "download the index"),
    ],
)
def test_a_file_of_another_name_is_named(reference, tmp_path, name, step):
    """It was said to be a shard without its index, or that the folder holds no weights."""
    folder = shutil.copytree(reference / "plain", tmp_path / "model")
    (folder / "training_args.bin").write_bytes(b"")
    (folder / SINGLE_NAME).rename(folder / name)
    with pytest.raises(FileNotFoundError, match=rf"found {re.escape(name)}, .*{step}"):
        load(folder)


# --- tokens added to the vocabulary ---------------------------------------------------------------


def test_new_rows_are_the_mean_of_the_old(release):
    """Rows of zeros or of noise for new tokens would change the logits of old ones, or make new
    ones win."""
    assistant = load(**release)
    model, rows = assistant.model, assistant.model.config.text.vocab_size
    before = {name: w.clone() for name, w in model.state_dict().items()}
    ids = torch.tensor([[1, 5, 9]])
    old_logits = model.language_model(ids).logits
    model.resize_token_embeddings(rows + 3)
    for name, w in model.state_dict().items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(w[:rows], before[name])
            mean = before[name].double().mean(0)
            bound = gamma(rows + 1, torch.float32) * before[name].double().abs().mean(0)
            assert_within(w[rows:], (mean.expand(3, -1), bound.expand(3, -1)))
        else:
            assert torch.equal(w, before[name])
    new_logits = model.language_model(ids).logits
    assert new_logits.shape[-1] == rows + 3 == model.config.text.vocab_size
    exactly = model.double().language_model
    allowed = network(model, lambda: {"logits": exactly(ids).logits[..., :rows]})["logits"]
    for found in (old_logits, new_logits[..., :rows]):  # of another width, another order of sums
        assert_within(found, allowed)
    with pytest.raises(ValueError, match=f"has {rows + 3} rows, asked for {rows}"):
        model.resize_token_embeddings(rows)


def test_growth_in_half_precision_is_the_mean_of_float32():
    """A sum in bfloat16 stops growing after a few hundred rows, and its mean is wrong."""
    table = (torch.randn(1000, 8) + 3).bfloat16()
    torch.testing.assert_close(
        grow_rows(table, 1001)[-1], table.double().mean(0).bfloat16(), rtol=0, atol=0
    )


def test_tokens_around_pictures_grow_tokenizer_and_model(release, picture):
    """A model trained with start and end tokens around pictures would be asked without them."""
    folder = release["weights"]
    rows = read_json(folder / "config.json")["vocab_size"]
    plain = load(**release)
    change(folder / "config.json", mm_use_im_patch_token=True, mm_use_im_start_end=True)
    assistant = load(**release)
    assert assistant.tokenizer.added == {IM_PATCH: rows, IM_START: rows + 1, IM_END: rows + 2}
    assert assistant.model.config.text.vocab_size == rows + 3
    ids, before = (a.tokenizer.encode(a.prompt(QUESTION)) for a in (assistant, plain))
    at = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[at - 1 : at + 2] == [rows + 1, IMAGE_TOKEN_INDEX, rows + 2]
    assert [i for i in ids if i not in (rows + 1, rows + 2)] == before
    assert logits(assistant, picture).shape[-1] == rows + 3
    change(folder / "config.json", mm_use_im_patch_token=None)  # LLaVA takes that for true
    assert load(**release).tokenizer.added == assistant.tokenizer.added


def test_ids_come_from_added_tokens_json_when_they_are_there(release):
    """New tokens would get ids that the files of the checkpoint give to others."""
    folder = release["weights"]
    path = folder / "tokenizer.model"
    pieces = Tokenizer(path).vocab_size
    write_json({"[PAD]": pieces, IM_START: pieces + 5}, folder / "added_tokens.json")
    before = Tokenizer(path).added
    assert before == {"[PAD]": pieces, IM_START: pieces + 5}
    found = Tokenizer(path, added=(IM_PATCH, IM_START, IM_END)).added
    assert found == before | {IM_PATCH: pieces + 6, IM_END: pieces + 7}
    write_json(
        {"added_tokens_decoder": {str(pieces + 8): {"content": IM_END}}},
        folder / "tokenizer_config.json",
    )
    found = Tokenizer(path, added=(IM_PATCH, IM_START, IM_END)).added
    assert found == before | {IM_PATCH: pieces + 9, IM_END: pieces + 8}
    write_json({IM_START: "many"}, folder / "added_tokens.json")
    with pytest.raises(ValueError, match="'<im_start>' is 'many', expected a token id"):
        Tokenizer(path, added=(IM_START,))


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("form", ["new rows", "full table", "none"])
def test_a_pre_train_may_bring_rows_for_its_tokens(release, base, pretrain, form, patch):
    """LLaVA's first stage with mm_use_im_start_end saves the two rows that it learned, or the whole
    table; the row of <im_patch>, which comes before them, is the mean of the base's."""
    rows = read_json(pretrain / "config.json")["vocab_size"]
    tokens = {"mm_use_im_start_end": True, "mm_use_im_patch_token": patch}
    change(pretrain / "config.json", **tokens, vocab_size=rows + 2 + patch)
    content = torch.load(pretrain / "mm_projector.bin")
    old, new = weights_of(base)[TABLE], torch.randn(2, weights_of(base)[TABLE].shape[1])
    mean = old.mean(0, keepdim=True)
    if form != "none":
        content[TABLE] = new if form == "new rows" else torch.cat([old, *[mean] * patch, new])
    torch.save(content, pretrain / "mm_projector.bin")
    model = load(
        pretrain, model_base=base, vision_tower=release["vision_tower"]
    ).model.language_model
    expected = mean.expand(2, -1) if form == "none" else new
    torch.testing.assert_close(
        model.embed_tokens.weight[rows:], torch.cat([*[mean] * patch, expected])
    )
    assert torch.equal(model.embed_tokens.weight[:rows], old)
    assert len(model.lm_head.weight) == rows + 2 + patch


# --- the hub's cache ------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch, reference) -> str:
    """The stored checkpoint in a hub cache: an id to load it by."""
    home = tmp_path / "cache" / "models--someone--llava"
    commit = "0123456789" * 4
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "blobs").mkdir()
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((reference / "plain").iterdir())):
        shutil.copy(path, home / "blobs" / str(i))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(i)))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return "someone/llava"


def test_an_id_finds_a_download(cached, picture, reference):
    """A model that was downloaded would have to be given as the long path of its snapshot."""
    expected = logits(load(reference / "plain"), picture)
    for revision in (None, "main", "0123456789" * 4):
        assert torch.equal(logits(load(cached, revision=revision), picture), expected)


def test_what_is_not_downloaded_says_how_to_get_it(cached, reference):
    """A user who has not downloaded a model would get an error without the command that does."""
    with pytest.raises(
        FileNotFoundError, match="no such folder here, and no such model in the hub cache"
    ):
        load("someone/other")
    with pytest.raises(FileNotFoundError, match=r"hf download someone/llava --revision old"):
        load(cached, revision="old")
    with pytest.raises(
        ValueError, match=r"revision 'main' belongs to a model of the hub, but .* is a folder"
    ):
        load(reference / "plain", revision="main")


def test_the_command_line_takes_ids_and_parts(
    cached, capfd, picture, pretrain, base, release, monkeypatch
):
    """An option of the command that does not reach load would be ignored without an error."""

    def run(*arguments: str) -> tuple[int, str]:
        status = main(["-i", str(picture), "-n", "2", "--dtype", "float32", "--json", *arguments])
        return status, capfd.readouterr().out

    status, by_id = run("-m", cached)
    assert status == 0
    monkeypatch.setenv("MINILLAVA_WEIGHTS", cached)
    assert json.loads(run()[1])["ids"] == json.loads(by_id)["ids"]
    tower = ["--vision-tower", str(release["vision_tower"])]
    status, whole = run("-m", str(release["weights"]), *tower)
    assert status == 0
    assert (
        json.loads(run("-m", str(pretrain), "--model-base", str(base), *tower)[1])["ids"]
        == json.loads(whole)["ids"]
    )


# --- "you have this folder, type this" ------------------------------------------------------------


README_ROWS = re.findall(
    r"^\| (.+) \| `(-m .+?)`(.*) \|$",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
FOLDERS = {  # how a row of README's table begins -> the folders that it means, by make_folder's names
    "`llava-hf/llava-1.5-7b-hf`, or a fine-tune": ["plain", "saved by transformers 5"],
    "the same, downloaded into the hub's cache": ["cached"],
    "`llava-hf/llava-interleave-qwen-0.5b-hf`": [
        *("interleave", "mistral", "phi-3", "tiny", "original", "vip", "llama-3"),
    ],
    "LLaVA-1.6: ": ["mistral-tiles", "vicuna-tiles", "onevision"],
    "LLaVA-1.6 by its authors": ["mistral-tiles original", "vicuna-tiles original"],
    "`liuhaotian/llava-v1.5-7b`": ["bin"],
    "a model that you trained with LLaVA's code": ["original"],
    "a LoRA by LLaVA's code": ["lora"],
    "a LoRA by PEFT": ["peft"],
    "a first stage": ["pretrain"],
}


@pytest.fixture
def make_folder(request, tmp_path, reference, write_dialect, monkeypatch):
    """`make_folder(name)`: what the words in capitals of a row stand for."""

    def fixture(name: str):
        return request.getfixturevalue(name)

    def alone(source: str) -> Path:
        """tokenizer.json without tokenizer.model, as transformers 5 saves it."""
        folder = Path(shutil.copytree(reference / source, tmp_path / "alone"))
        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        (folder / "tokenizer.model").unlink()
        write_json(llama_json.as_json(pieces), folder / "tokenizer.json")
        return folder

    def make(name: str) -> dict[str, Path]:
        kind, _, dialect = name.partition(" original")
        if kind in relatives.KINDS:
            dialect = "original" if name.endswith("original") else "hub"
            return {"DIR": relatives.stored(tmp_path / "relative", kind, dialect)}
        if name == "cached":
            home = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf"
            (home / "refs").mkdir(parents=True)
            for revision in ("main", "NAME"):
                (home / "refs" / revision).write_text("a" * 40)
            shutil.copytree(reference / "plain", home / "snapshots" / ("a" * 40))
            monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
            return {}
        if name == "phi-3":
            folder = Path(shutil.copytree(reference / "plain", tmp_path / "phi"))
            names = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
            added = {text: 442 + i for i, text in enumerate(names)}
            write_json({"<image>": 440, "<pad>": 441} | added, folder / "added_tokens.json")
            return {"DIR": folder}
        clip = fixture("release")["vision_tower"] if name in ("bin", "lora", "pretrain") else None
        if name == "bin":
            folder = fixture("release")["weights"]
            torch.save(weights_of(folder), folder / BIN_NAME)
            (folder / SINGLE_NAME).unlink()
            return {"DIR": folder, "CLIP": clip}
        if name == "lora":
            return {"DIR": fixture("write_lora")()[0], "BASE": fixture("base"), "CLIP": clip}
        if name == "peft":
            adapter, _ = fixture("write_lora")()
            (adapter / "non_lora_trainables.bin").unlink()
            (adapter / "config.json").unlink()
            return {"DIR": adapter, "MODEL": reference / "plain"}
        if name == "pretrain":
            return {"DIR": fixture("pretrain"), "VICUNA": fixture("base"), "CLIP": clip}
        if name == "original":
            return {"DIR": write_dialect("original", tmp_path / "original")["weights"]}
        return {"DIR": alone("grouped" if name == "tiny" else "plain") if name != "plain" else
                reference / "plain"}  # fmt: skip

    return make


def test_every_row_of_readme_s_table_has_a_folder():
    """A row would be typed by nobody."""
    starts = [[row for row, *_ in README_ROWS if row.startswith(start)] for start in FOLDERS]
    assert len(README_ROWS) == len(FOLDERS) and all(len(rows) == 1 for rows in starts)


@pytest.mark.parametrize(("start", "name"), [(k, n) for k, names in FOLDERS.items() for n in names])
def test_you_have_this_folder_type_this(make_folder, picture, run_main, start, name):
    """What README tells to type would be refused, or answer otherwise than transformers."""
    (typed, more) = next(row[1:] for row in README_ROWS if row[0].startswith(start))
    named = make_folder(name)
    flags = [str(named.get(word, word)) for word in typed.split()]
    assert not {word for word in flags if word.isupper()}
    asked = ["--image", picture, "--prompt", "What is in the image?", "--device", "cpu"]
    asked += ["--dtype", "float32", "--max-new-tokens", "8", "-v"]
    status, out, err = run_main(main, *flags, *asked)
    assert status == 0, err
    if "--revision" in more:
        assert run_main(main, *flags, "--revision", "NAME", *asked)[:2] == (0, out)
    kind = name.partition(" original")[0]
    if (
        kind in ("interleave", "llama-3", "mistral-tiles", "onevision") and name == kind
    ):  # stored with their own templates
        (stored, _) = relatives.facts()[kind]["questions"]
        tokenizer = load(named["DIR"]).tokenizer
        assert out.strip() == tokenizer.decode(stored["greedy"]).strip()
    else:
        assert out.strip()
        told = {"mistral-tiles": "mistral_instruct", "phi-3": "phi_3", "vip": "llava_v0"}
        if "--model-base" not in flags and "DIR" in named:  # the others are parts
            report = inspect_folder(named.get("MODEL", named["DIR"]))
            assert report.template["name"] == told.get(kind, "llava_v1")
