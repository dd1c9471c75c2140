"""Checkpoint folders: strict about files, names, shapes and dtypes; nothing copied that need not
be."""

import errno
import io
import json
import os
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import python
from folders import change_config
from paths import REFERENCE
from safetensors.torch import load_file, save_file

import minillava
from minillava.attention import fused
from minillava.checkpoint import build as building
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.parts import open_checkpoint
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.towers import settle
from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig, VisionConfig
from minillava.files.tensors import BIN_INDEX_NAME, BIN_NAME, INDEX_NAME, SINGLE_NAME
from minillava.inspection.report import inspect_folder
from minillava.inspection.text import as_text

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
TOWER = "vision_tower.vision_model."
CLIP_NAME = "openai/clip-vit-large-patch14-336"


@pytest.fixture
def sharded(tmp_path, write_dialect) -> Path:
    """The same weights in three shards with an index."""
    return write_dialect("hub", tmp_path / "sharded", shards=3)["weights"]


def build(folder: Path, clip: Path | None = None, dtype: torch.dtype = torch.float32):
    config = read_config(folder, clip)
    checkpoint, config = open_checkpoint(Folders(folder, clip), config)
    return build_model(config, checkpoint, fused, dtype=dtype, device="cpu"), checkpoint


def load(folder: Path, **options):
    return minillava.load(folder, device="cpu", **options)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    # Clones: load_file may map the file into memory, and tests write over it.
    return {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}


def store(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        folder / SINGLE_NAME,
    )


def change_index(folder: Path, change) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def refusal(folder: Path, error: type[Exception] = ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        load(folder, **options)
    assert type(caught.value) is error
    return str(caught.value)


def same_weights(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


# --- the right tensor in the right place ----------------------------------------------------------


def test_every_tensor_arrives_unchanged_under_its_name(folder):
    """Two tensors of one shape that change places load without an error, and the answers are
    nonsense."""
    model, checkpoint = build(folder)
    file = stored(folder)
    state = model.state_dict()
    assert {checkpoint.tensors[name][0] for name in state} | set(checkpoint.unused) == file.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, file[checkpoint.tensors[name][0]]), name
    # A rename that swaps two tensors of one shape would pass the lines above: these are the names,
    # written out.
    for ours, theirs in {
        "language_model.embed_tokens.weight": EMBEDDING,
        "language_model.lm_head.weight": HEAD,
        "language_model.layers.1.self_attn.q_proj.weight": QUERY,
        "language_model.layers.1.mlp.up_proj.weight": "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.norm.weight": "language_model.model.norm.weight",
        "projector.linear_2.weight": "multi_modal_projector.linear_2.weight",
        "vision_tower.embeddings.class_embedding": f"{TOWER}embeddings.class_embedding",
        "vision_tower.encoder.layers.1.self_attn.k_proj.bias": f"{TOWER}encoder.layers.1.self_attn.k_proj.bias",
    }.items():
        assert torch.equal(state[ours], file[theirs]), ours


def test_shards_hold_what_a_single_file_holds(folder, sharded):
    """A tensor taken from the wrong shard would change the model without an error."""
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert same_weights(build(folder)[0], build(sharded)[0])


def test_an_index_may_name_one_file_only(folder):
    """A folder with an index beside its single file would be refused, or read differently."""
    (folder / INDEX_NAME).write_text(
        json.dumps({"weight_map": dict.fromkeys(stored(folder), SINGLE_NAME)})
    )
    assert same_weights(build(folder)[0], build(REFERENCE / "plain")[0])


def test_files_may_be_links_as_in_the_hub_cache(tmp_path, sharded):
    """A model of the hub cache, whose files are links to blobs elsewhere, would be refused as
    leading out of its folder."""
    links = tmp_path / "links"
    links.mkdir()
    for i, path in enumerate(sorted(sharded.iterdir())):
        blob = path.rename(tmp_path / f"blob{i}")
        (links / path.name).symlink_to(blob)
    assert same_weights(load(links, dtype="float32").model, build(REFERENCE / "plain")[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_are_converted_to_the_dtype_asked_for(folder, dtype):
    """A tensor that kept its stored dtype would meet one of another dtype in the middle of an
    answer."""
    model = load(folder, dtype=dtype).model
    wanted, file = getattr(torch, dtype), stored(folder)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {wanted}
    assert torch.equal(model.language_model.lm_head.weight, file[HEAD].to(wanted))


def test_the_dtype_of_a_checkpoint_is_that_of_its_largest_tensor(folder):
    """A few small float32 tensors would make a half-precision model take twice its memory."""
    tensors = stored(folder)
    store({**tensors, EMBEDDING: tensors[EMBEDDING].half(), HEAD: tensors[HEAD].half()}, folder)
    assert StoredWeights(folder).dtype() is torch.float16


# --- names and shapes -----------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_all_listed_with_the_nearest_names(folder):
    """With only the first fault reported, a user would mend a checkpoint one failed load at a
    time."""
    tensors = stored(folder)
    tensors[QUERY.replace("q_proj", "query")] = tensors.pop(QUERY)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(7, 5)
    tensors.pop("multi_modal_projector.linear_1.bias")
    tensors["zzz"] = torch.zeros(1)
    store(tensors, folder)
    first, *rest = refusal(folder).splitlines()
    problem, count, advice = re.fullmatch(
        r"(.*); (\d+) tensor\(s\) do not fit: (.*)", first
    ).groups()
    assert count == "5"
    assert "download" in advice
    file, query = folder / SINGLE_NAME, "language_model.layers.1.self_attn.q_proj.weight"
    assert [problem, *(line.strip() for line in rest)] == [
        f"{file}: multi_modal_projector.linear_1.weight has shape [7, 5], config.json expects [64, "
        "32]",
        "projector.linear_1.bias is missing",
        f"{query} is missing (nearest: {QUERY.replace('q_proj', 'query')})",
        f"{file}: {QUERY.replace('q_proj', 'query')} is not part of this model (nearest: {query})",
        f"{file}: zzz is not part of this model",
    ]


@pytest.mark.parametrize(
    "name",
    [EMBEDDING, QUERY, HEAD, f"{TOWER}pre_layrnorm.bias", "multi_modal_projector.linear_2.bias"],
)
def test_any_single_missing_tensor_is_noticed(folder, name):
    """A tensor that is not in the file would keep whatever values its memory had, without an
    error."""
    tensors = stored(folder)
    tensors.pop(name)
    store(tensors, folder)
    message = refusal(folder)
    assert "1 tensor(s)" in message
    assert name.split(".", 2)[2] in message
    assert "is missing" in message


def test_a_tensor_of_the_right_size_and_the_wrong_shape_is_noticed(folder):
    """A transposed matrix has as many numbers, and would be loaded as if it were the right one."""
    tensors = stored(folder)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 96)
    store(tensors, folder)
    assert "mlp.up_proj.weight has shape [64, 96], config.json expects [96, 64]" in refusal(folder)


def test_one_more_layer_than_the_config_says_is_not_dropped(folder):
    """A config.json with too few layers would cut the model off without an error."""
    tensors = stored(folder)
    store({**tensors, QUERY.replace("layers.1", "layers.2"): tensors[QUERY]}, folder)
    assert "layers.2.self_attn.q_proj.weight is not part of this model" in refusal(folder)


def test_one_more_vision_block_than_the_config_says_is_not_dropped(folder):
    """The last block is not needed; one beyond it means that config.json is about another tower."""
    name = f"{TOWER}encoder.layers.3.mlp.fc1.bias"
    store({**stored(folder), name: torch.zeros(64)}, folder)
    assert f"{name} is not part of this model" in refusal(folder)


def test_two_stored_names_for_one_tensor_are_refused(folder):
    """One of two different heads would win by the order of the file, and nobody would know
    which."""
    tensors = stored(folder)
    store({**tensors, "lm_head.weight": tensors[HEAD] + 1}, folder)
    message = refusal(folder)
    assert message.startswith(f"{folder}: ")
    assert HEAD in message.split()
    assert "lm_head.weight" in message.split()


def test_a_thousand_wrong_names_are_reported_before_anyone_wonders(folder, monkeypatch):
    """A language model of 13B's depth under strange names: looking for the nearest of each took
    most of a minute."""
    change_config(folder, text_config={"num_hidden_layers": 40})
    tensors = {
        name: tensor
        for name, tensor in stored(folder).items()
        if not name.startswith("language_model.")
    }
    strange = [f"transformer.h.{i}.part.{j}.weight" for i in range(40) for j in range(9)]
    store({**tensors, **{name: torch.zeros(1) for name in strange}}, folder)
    asked, near = [], building.get_close_matches
    monkeypatch.setattr(
        building, "get_close_matches", lambda *a, **more: asked.append(a) or near(*a, **more)
    )
    lines = refusal(folder, dtype="float32").splitlines()
    assert f"; {40 * 9 + 3 + len(strange)} tensor(s) do not fit" in lines[0]
    named = {word for line in lines for word in line.split()}
    assert named > set(strange)
    # layers are alike: the names of one are compared, not those of 40
    assert 0 < len(asked) < 40 and max(len(known) for _, known in asked) < 40


# --- what a file may hold besides -----------------------------------------------------------------


def test_computed_buffers_and_unneeded_vision_layers_are_set_aside_by_name(folder):
    """Releases store buffers and a last vision block that LLaVA does not use: they must not be
    refused as unexpected, nor hide others that are."""
    buffers = {
        f"{TOWER}embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    tensors = stored(folder)
    store({**tensors, **buffers}, folder)
    model, checkpoint = build(folder)
    last_block = {name for name in tensors if name.startswith(f"{TOWER}encoder.layers.2.")}
    assert len(last_block) == 16
    post = {f"{TOWER}post_layernorm.weight", f"{TOWER}post_layernorm.bias"}
    assert sorted(checkpoint.unused) == sorted({*buffers, *last_block, *post})
    assert same_weights(model, build(REFERENCE / "plain")[0])


def test_a_feature_layer_of_minus_one_needs_the_last_block(folder):
    """The last vision block would be left out of a model that reads its output."""
    change_config(folder, vision_feature_layer=-1)
    model, checkpoint = build(folder)
    assert sorted(checkpoint.unused) == [
        f"{TOWER}post_layernorm.bias",
        f"{TOWER}post_layernorm.weight",
    ]
    assert len(model.vision_tower.encoder.layers) == 3


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("name", [EMBEDDING, QUERY])
def test_quantised_weights_are_refused_by_name_and_dtype(folder, name, dtype):
    """Integers of a quantised checkpoint, converted to floats without their scales, would be
    nonsense weights."""
    tensors = stored(folder)
    store({**tensors, name: torch.zeros(tensors[name].shape).to(dtype)}, folder)
    message = refusal(folder, dtype="float32")
    assert message.startswith(str(folder))
    assert name in message
    assert str(dtype) in message


# --- files ----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_a_file_is_refused(tmp_path, folder):
    """A mistyped path, or the path of the weights file itself, would end in a traceback."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        StoredWeights(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file"):
        StoredWeights(folder / SINGLE_NAME)


@pytest.mark.parametrize(
    ("left", "found"),
    [
        ((), "holds no weights, expected model.safetensors or model.safetensors.index.json"),
        (
            ("pytorch_model-00001-of-00002.bin",),
            "found pytorch_model-00001-of-00002.bin, expected .* the index",
        ),
        (
            ("model-00001-of-00002.safetensors",),
            "found model-00001-of-00002.safetensors, expected .* the index",
        ),
    ],
)
def test_a_folder_without_weights_says_what_it_holds_instead(folder, left, found):
    """A download that left out the index or the weights would be called empty, though its shards
    are in the folder."""
    (folder / SINGLE_NAME).unlink()
    for name in left:
        (folder / name).touch()
    with pytest.raises(FileNotFoundError, match=found) as caught:
        load(folder)
    assert str(caught.value).startswith(str(folder))


def test_an_absent_shard_is_named(sharded):
    """After an interrupted download a user has to know which of the files is missing."""
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refusal(sharded, FileNotFoundError)
    assert message.startswith(f"{sharded / 'model-00002-of-00003.safetensors'}: not found")
    assert "download" in message


def test_an_index_naming_a_tensor_that_no_shard_holds_is_refused(sharded):
    """An index of another release would end in a KeyError instead of naming the tensor and the
    file."""
    file = "model-00001-of-00003.safetensors"
    change_index(sharded, lambda placed: placed.update({"language_model.model.ghost": file}))
    message = refusal(sharded)
    assert message.startswith(f"{sharded / INDEX_NAME}: ")
    assert "language_model.model.ghost" in message
    assert file in message


def test_an_index_naming_the_wrong_shard_is_refused(sharded):
    """An index that sends a tensor to the wrong shard would end in a KeyError, or be ignored."""
    right = json.loads((sharded / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"][QUERY]
    wrong = next(path.name for path in sorted(sharded.glob("*.safetensors")) if path.name != right)
    change_index(sharded, lambda placed: placed.update({QUERY: wrong}))
    message = refusal(sharded)
    assert message.startswith(f"{sharded / INDEX_NAME}: ")
    assert QUERY in message
    assert wrong in message


def test_a_tensor_that_the_index_does_not_know_is_refused(sharded):
    """A tensor of a shard that the index leaves out would be dropped without an error."""
    file = json.loads((sharded / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"][QUERY]
    change_index(sharded, lambda placed: placed.pop(QUERY))
    message = refusal(sharded)
    assert message.startswith(f"{sharded / file}: ")
    assert QUERY in message


@pytest.mark.parametrize("says", [0, 1])
def test_a_tensor_in_two_shards_is_refused_naming_both(sharded, says):
    """Which of the two is meant? The index says one, and the other may be newer."""
    paths = sorted(sharded.glob("*.safetensors"))
    homes = [path for path in paths if QUERY in load_file(path)] + [
        path for path in paths if QUERY not in load_file(path)
    ]
    first, second = homes[:2]
    save_file({**load_file(second), QUERY: load_file(first)[QUERY] + 1}, second)
    change_index(sharded, lambda placed: placed.update({QUERY: homes[says].name}))
    message = refusal(sharded)
    assert QUERY in message
    assert first.name in message
    assert second.name in message


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "sub/inside.safetensors", "..", "", "a\\b"]
)
def test_an_index_cannot_lead_out_of_its_folder(sharded, name):
    """A downloaded index could have any file of the disk opened as weights."""
    save_file({QUERY: torch.zeros(64, 64)}, sharded.parent / "outside.safetensors")
    change_index(sharded, lambda placed: placed.update({QUERY: name}))
    message = refusal(sharded)
    assert message.startswith(f"{sharded / INDEX_NAME}: names the file {name!r}")


def test_an_index_cannot_name_an_absolute_path(sharded):
    """Joining a folder and an absolute path gives that path: the folder would be ignored."""
    path = shutil.copy(REFERENCE / "plain" / SINGLE_NAME, sharded.parent / "elsewhere.safetensors")
    change_index(sharded, lambda placed: placed.update(dict.fromkeys(placed, str(path))))
    assert refusal(sharded).startswith(f"{sharded / INDEX_NAME}: names the file {str(path)!r}")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', ""],
)
def test_an_index_that_is_none_is_refused_by_name(sharded, content):
    """A damaged index would end in a traceback that does not name the file."""
    (sharded / INDEX_NAME).write_text(content, encoding="utf-8")
    message = refusal(sharded)
    assert message.startswith(f"{sharded / INDEX_NAME}: ")
    assert "download" in message


def cut_points() -> list[int]:
    """Lengths to cut the stored file to: within the length of the header, the header, and the
    data."""
    content = (REFERENCE / "plain" / SINGLE_NAME).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    return [
        0,
        1,
        7,
        8,
        9,
        header // 2,
        header - 1,
        header,
        header + 1,
        len(content) // 2,
        len(content) - 1,
    ]


@pytest.mark.parametrize("length", cut_points())
def test_a_truncated_file_is_refused_wherever_it_ends(folder, length):
    """An interrupted download would end in a traceback, or load with zeros at its end."""
    path = folder / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(folder)
    assert message.startswith(f"{path}: truncated or not a safetensors file")
    assert "download it again" in message
    assert "\n" not in message


def test_a_truncated_shard_is_named(sharded):
    """Without its name, a user would download every shard again for the sake of one."""
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(sharded).startswith(f"{path}: truncated or not a safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0))
        .byte()
        .numpy()
        .tobytes(),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 724584\n",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 10**12) + b"{}" + b" " * 100,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a": 1}',
        b"PK\x03\x04" + bytes(200),
    ],
    ids=[
        "random bytes",
        "git-lfs pointer",
        "header 2^63",
        "header 2^64",
        "header 10^12",
        "list",
        "no tensors",
        "zip",
    ],
)
def test_what_is_not_a_safetensors_file_is_refused_by_name(folder, content):
    """Bytes that only look like a file of weights would end in a traceback, or in an attempt to
    read a header of 2^63 bytes."""
    (folder / SINGLE_NAME).write_bytes(content)
    message = refusal(folder)
    found = (
        "is a Git LFS pointer"
        if content.startswith(b"version")
        else "truncated or not a safetensors file"
    )
    assert message.startswith(f"{folder / SINGLE_NAME}: {found}")
    assert "\n" not in message


def test_a_directory_in_the_place_of_the_file_is_refused_by_name(folder):
    """A directory called model.safetensors would end in a traceback that does not say where it
    is."""
    (folder / SINGLE_NAME).unlink()
    (folder / SINGLE_NAME).mkdir()
    assert refusal(folder).startswith(str(folder / SINGLE_NAME))


# --- the original dialect -------------------------------------------------------------------------


def test_an_original_without_tower_says_which_clip_to_get(tmp_path, write_dialect):
    """An original release has no vision tower: its tensors would be listed as missing, with no word
    on where to get them."""
    folder = write_dialect("original-bare", tmp_path)["weights"]
    message = refusal(folder, FileNotFoundError)
    assert message.startswith(f"{folder}: holds no vision tower")
    assert CLIP_NAME in message
    assert "--vision-tower" in message
    change_config(folder, mm_vision_tower="somebody/another-clip")
    assert "somebody/another-clip" in refusal(folder, FileNotFoundError)


def test_an_original_takes_its_tower_from_a_clip_folder_and_drops_the_text_half(
    tmp_path, write_dialect
):
    """CLIP's text half, which LLaVA does not use, would be refused as unexpected tensors."""
    options = write_dialect("original-bare", tmp_path)
    model, checkpoint = build(options["weights"], options["vision_tower"])
    tower = stored(REFERENCE / "plain")
    assert torch.equal(
        model.vision_tower.embeddings.position_embedding.weight,
        tower[f"{TOWER}embeddings.position_embedding.weight"],
    )
    clip = load_file(options["vision_tower"] / SINGLE_NAME).keys()
    text_half = {name for name in clip if not name.startswith("vision_model.")}
    assert {"logit_scale", "text_projection.weight", "visual_projection.weight"} < text_half
    assert any(name.startswith("text_model.") for name in text_half)
    assert text_half < set(checkpoint.unused)
    assert "vision_model.post_layernorm.weight" in checkpoint.unused
    assert "vision_model.embeddings.position_ids" in checkpoint.unused


def test_a_clip_of_its_vision_half_alone_works_with_and_without_prefix(tmp_path, write_dialect):
    """A CLIP saved without its text half, or without the prefix of its names, would be refused."""
    options = write_dialect("original-bare", tmp_path)
    clip = options["vision_tower"]
    whole, _ = build(folder=options["weights"], clip=clip)
    vision = {
        name: tensor for name, tensor in stored(clip).items() if name.startswith("vision_model.")
    }
    for prefix in ("vision_model.", ""):
        # `whole` is mapped from the other
        half = Path(shutil.copytree(clip, tmp_path / f"half {prefix}"))
        store(
            {
                prefix + name.removeprefix("vision_model."): tensor
                for name, tensor in vision.items()
            },
            half,
        )
        assert same_weights(build(options["weights"], half)[0], whole)


def test_a_clip_folder_replaces_the_tower_inside(folder, tmp_path, write_dialect):
    """The tower that the user asked for would give way to that of the checkpoint without a note."""
    clip = write_dialect("original-bare", tmp_path / "bare")["vision_tower"]
    tensors = stored(clip)
    name = "vision_model.embeddings.class_embedding"
    store({**tensors, name: tensors[name] + 1}, clip)
    model, checkpoint = build(folder, clip)
    assert torch.equal(model.vision_tower.embeddings.class_embedding, tensors[name] + 1)
    assert f"{TOWER}embeddings.class_embedding" in checkpoint.unused
    assert any("holds a vision tower of its own" in note for note in checkpoint.notes)


@pytest.mark.parametrize("damage", ["misshapen", "integer", "unexpected"])
def test_a_wrong_tensor_of_a_clip_folder_is_reported_with_that_folder(
    tmp_path, write_dialect, damage
):
    """A fault of the CLIP folder would be blamed on the folder of the language model."""
    options = write_dialect("original-bare", tmp_path)
    clip = options["vision_tower"]
    tensors = stored(clip)
    name = "vision_model.pre_layrnorm.weight"
    if damage == "unexpected":
        name = "vision_model.extra"
    tensors[name] = torch.zeros(32, dtype=torch.int8) if damage == "integer" else torch.zeros(7)
    store(tensors, clip)
    message = refusal(folder=options["weights"], vision_tower=clip)
    assert name in message
    assert str(clip) in message


def test_a_clip_folder_without_weights_is_named(tmp_path, write_dialect):
    """The error would name the model's folder, which has its weights, and not CLIP's."""
    options = write_dialect("original-bare", tmp_path)
    (options["vision_tower"] / SINGLE_NAME).unlink()
    message = refusal(options["weights"], FileNotFoundError, vision_tower=options["vision_tower"])
    assert message.startswith(str(options["vision_tower"]))


@pytest.mark.parametrize(
    ("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)]
)
def test_the_originals_projectors_of_every_depth(tmp_path, write_dialect, kind, layers):
    """A projector of another depth than two layers would be refused, or have its layers mixed
    up."""
    folder = write_dialect("original", tmp_path)["weights"]
    change_config(folder, mm_projector_type=kind)
    tensors = {
        name: tensor for name, tensor in stored(folder).items() if "mm_projector" not in name
    }
    new = {}
    for i in range(layers):
        number = "" if kind == "linear" else f"{2 * i}."
        new[f"model.mm_projector.{number}weight"] = torch.full((64, 64 if i else 32), float(i + 1))
        new[f"model.mm_projector.{number}bias"] = torch.full((64,), -float(i + 1))
    store({**tensors, **new}, folder)
    projector = build(folder)[0].projector
    found = {name: m for name, m in projector.named_modules() if isinstance(m, torch.nn.Linear)}
    assert list(found) == [f"linear_{i + 1}" for i in range(layers)]
    for i, layer in enumerate(found.values()):
        assert (layer.weight == i + 1).all()
        assert (layer.bias == -(i + 1)).all()


# --- the head -------------------------------------------------------------------------------------


def test_a_tied_head_is_the_embedding_table():
    """A tied model stores no head: it would be refused as lacking one, or given a second table."""
    model = load(REFERENCE / "tied").model
    assert HEAD not in stored(REFERENCE / "tied")
    assert "language_model.lm_head.weight" not in model.state_dict()
    x = torch.ones(1, 1, 64, dtype=model.language_model.embed_tokens.weight.dtype)
    assert torch.equal(model.language_model.head(x), x @ model.language_model.embed_tokens.weight.T)


def test_a_stored_head_counts_even_where_the_config_says_tied(tmp_path):
    """A trained head would be thrown away because config.json calls it tied."""
    folder = Path(shutil.copytree(REFERENCE / "tied", tmp_path / "tied"))
    tensors = stored(folder)
    store({**tensors, HEAD: tensors[EMBEDDING] + 1}, folder)
    model = load(folder, dtype="float32").model
    assert torch.equal(model.language_model.lm_head.weight, tensors[EMBEDDING] + 1)
    assert torch.equal(model.language_model.embed_tokens.weight, tensors[EMBEDDING])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "grouped", "tied"])
def test_nothing_is_left_without_values(kind):
    """A tensor left on the meta device fails in the first answer only, and dropout left on makes
    answers differ from run to run."""
    model = load(REFERENCE / kind).model
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.training


def test_nothing_is_drawn_at_random(folder):
    """Initial values drawn before the weights are read cost time and change what a user's seed
    gives."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load(folder, dtype="float32").model
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(load(folder, dtype="float32").model, first)


def test_at_the_stored_dtype_every_weight_is_the_mapped_file_itself(folder):
    """A copy of the weights would double the memory and the time that loading takes."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc to see what memory is mapped to")
    model, _ = build(folder)
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(str(folder / SINGLE_NAME)):
            ranges.append([int(address, 16) for address in line.split()[0].split("-")])
    assert ranges
    for name, tensor in model.state_dict().items():
        end = tensor.data_ptr() + tensor.nbytes
        assert any(low <= tensor.data_ptr() and end <= high for low, high in ranges), name


def test_changing_a_loaded_weight_leaves_the_file_alone(folder):
    """Mapped privately: a merged adapter must not end up in somebody's checkpoint."""
    before = (folder / SINGLE_NAME).read_bytes()
    model, _ = build(folder)
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1)
    assert torch.equal(model.language_model.lm_head.weight, stored(REFERENCE / "plain")[HEAD] + 1)
    assert (folder / SINGLE_NAME).read_bytes() == before


MEASURE = """
import json, sys
from pathlib import Path
import torch
import minillava

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def bytes_read():
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])

def load(folder):
    return minillava.load(folder, device="cpu", **json.loads(sys.argv[3]))

def run(model):
    with torch.no_grad():
        model.language_model(torch.tensor([[1]]), last_only=True)

torch.set_num_threads(1)
run(load(sys.argv[1]).model)  # what a first time costs besides: imports, thread pools, kernels
before = {"peak": status("VmHWM"), "anonymous": status("RssAnon"), "read": bytes_read()}
model = load(sys.argv[2]).model
loaded = {"peak": status("VmHWM"), "anonymous": status("RssAnon"), "read": bytes_read()}
run(model)
ran = {"peak": status("VmHWM"), "anonymous": status("RssAnon"), "read": bytes_read()}
weights = sum(p.nbytes for p in model.state_dict().values())
largest = max(p.nbytes for p in model.state_dict().values())
growth = lambda after: {key: after[key] - before[key] for key in before}
print(json.dumps({"weights": weights, "largest": largest, "loaded": growth(loaded), "ran": growth(ran)}))
"""


def write_large(folder: Path) -> None:
    """`plain` with a language model of about 300 MB in bfloat16, all zeros: a file with a hole,
    quickly written."""
    shutil.copytree(REFERENCE / "plain", folder)
    text = {
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
    }
    change_config(folder, text_config=text)
    with torch.device("meta"):
        model = minillava_model(folder)
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        length = tensor.numel() * 2
        header[stored_name(name)] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(folder / SINGLE_NAME, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + offset)


def minillava_model(folder: Path):
    from minillava.llava import Llava

    return Llava(read_config(folder))


def stored_name(name: str) -> str:
    if name.startswith("language_model.") and not name.startswith("language_model.lm_head."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", TOWER).replace("projector.", "multi_modal_projector.")


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """`measure(**settings)`: what loading and running a checkpoint of 300 MB takes, in a process of
    its own."""
    status = Path("/proc/self/status")
    if not status.exists() or "RssAnon" not in status.read_text(encoding="utf-8"):
        pytest.skip("needs Linux's /proc to measure memory and reads")
    folder = tmp_path_factory.mktemp("large") / "large"
    write_large(folder)

    def measured(**settings):
        done = python("-c", MEASURE, REFERENCE / "plain", folder, json.dumps(settings))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return measured


@pytest.mark.parametrize(
    "settings", [{"quantize": "int4", "dtype": "bfloat16"}, {"dtype": "float32"}], ids=str
)
@pytest.mark.slow
def test_what_is_converted_is_let_go(measure, settings):
    """Resident memory of any kind, the mapped file included, holds the new weights and a few
    tensors at a time, not the 300 MB they were made of."""
    found = measure(**settings)
    assert found["weights"] > (80e6 if "quantize" in settings else 500e6)
    assert found["loaded"]["peak"] < found["weights"] + 200e6


@pytest.mark.slow
def test_loading_copies_nothing_and_reads_nothing(measure):
    """The yardstick is the largest tensor: had a single one of its size been copied or read, let
    alone all, one of these numbers would be above it."""
    found = measure(dtype="bfloat16", attention="eager")
    assert found["weights"] > 250e6
    assert found["loaded"]["peak"] < found["largest"]  # resident memory of any kind, at its highest
    assert found["loaded"]["anonymous"] < found["largest"]
    # through read(): the mapped file does not count
    assert found["loaded"]["read"] < found["largest"]
    # a forward pass touches the file's pages, copies none
    assert found["ran"]["anonymous"] < found["largest"]
    assert found["ran"]["read"] < found["largest"]
    assert found["ran"]["peak"] < found["weights"] + found["largest"]


# --- two sets of weights in one folder ------------------------------------------------------------


def zero_head(folder: Path, name: str) -> None:
    """Another set: the whole model under `name`, its head zeros."""
    tensors = stored(REFERENCE / "plain") | {
        HEAD: torch.zeros_like(stored(REFERENCE / "plain")[HEAD])
    }
    torch.save(tensors, folder / name) if name.endswith(".bin") else save_file(
        tensors, folder / name
    )


def other_index(folder: Path, name: str) -> None:
    (folder / name).write_text(
        json.dumps({"weight_map": dict.fromkeys(stored(REFERENCE / "plain"), "other.bin")})
    )
    zero_head(folder, "other.bin")


@pytest.mark.parametrize(
    ("shards", "add", "read"),
    [
        # the last save wins, as in transformers
        (3, lambda to: zero_head(to, SINGLE_NAME), SINGLE_NAME),
        (1, lambda to: other_index(to, BIN_INDEX_NAME), SINGLE_NAME),
        (1, lambda to: zero_head(to, BIN_NAME), SINGLE_NAME),
        (3, lambda to: zero_head(to, BIN_NAME), INDEX_NAME),
        # of an earlier save
        (3, lambda to: zero_head(to, "model-00001-of-00009.safetensors"), INDEX_NAME),
        (1, lambda to: zero_head(to, "model-00001-of-00009.safetensors"), SINGLE_NAME),
        (1, lambda to: zero_head(to, "mm_projector.bin"), SINGLE_NAME),
    ],
)
def test_of_several_sets_of_weights_one_is_read_and_a_note_names_both(
    tmp_path, write_dialect, shards, add, read
):
    """A folder with model.safetensors and an index was opened as the older of the two without a
    word."""
    folder = write_dialect("hub", tmp_path / "model", shards=shards)["weights"]
    before = {path.name for path in folder.iterdir()}
    add(folder)
    added = next(iter({path.name for path in folder.iterdir()} - before - {"other.bin"}))
    with pytest.warns(UserWarning, match=f"weights are read from {read}, not from ") as told:
        head = load(folder, dtype="float32").model.language_model.lm_head.weight
    other = INDEX_NAME if added == SINGLE_NAME else added
    assert len(told) == 1 and other in str(told[0].message)
    assert (head.abs().max() == 0) == (added == read)
    report = inspect_folder(folder)
    assert report.notes == [str(told[0].message)]
    assert f"note                     {report.notes[0]}" in as_text(report)
    files = {Path(path).name for path in report.read}
    assert files == {SINGLE_NAME} if read == SINGLE_NAME else len(files) == 3


def test_the_bin_index_gives_way_to_the_single_bin(folder):
    """With two sets of .bin files, a user would not learn which of them the model was read from."""
    zero_head(folder, BIN_NAME)
    (folder / SINGLE_NAME).unlink()
    other_index(folder, BIN_INDEX_NAME)
    with pytest.warns(UserWarning, match=f"read from {BIN_NAME}, not from {BIN_INDEX_NAME}"):
        load(folder)


def test_an_index_of_the_file_that_is_read_is_no_other_set(folder, recwarn):
    """A warning about a second set of weights would appear where there is only one."""
    (folder / INDEX_NAME).write_text(
        json.dumps({"weight_map": dict.fromkeys(stored(folder), SINGLE_NAME)})
    )
    load(folder)
    assert not recwarn.list


@pytest.mark.parity
def test_transformers_reads_the_same_set(tmp_path, write_dialect):
    """Of two sets in one folder, transformers would load one and we the other."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra: parity)"
    )
    folder = write_dialect("hub", tmp_path / "model", shards=3)["weights"]
    zero_head(folder, SINGLE_NAME)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with pytest.warns(UserWarning, match="not from"):
        ours = load(folder, dtype="float32").model
    assert torch.equal(ours.language_model.lm_head.weight, theirs.lm_head.weight)


# --- what training wraps around a model -----------------------------------------------------------


def renamed(folder: Path, change) -> Path:
    store({change(name): tensor for name, tensor in stored(folder).items()}, folder)
    return folder


@pytest.mark.parametrize("dialect", ["hub", "original"])
@pytest.mark.parametrize(
    "wrapper",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.", "_forward_module.",
     "base_model.model.", "module.base_model.model.", "llava.", "student.net."],
)  # fmt: skip
def test_wrappers_before_all_names_are_taken_off(tmp_path, write_dialect, wrapper, dialect):
    """They led to the advice to download a vision tower, which was there."""
    folder = write_dialect(dialect, tmp_path / "model")["weights"]
    plain = load(folder, dtype="float32").model
    # the plain one's weights lie in its mapped file
    other = Path(shutil.copytree(folder, tmp_path / "renamed"))
    assert same_weights(
        load(renamed(other, lambda name: wrapper + name), dtype="float32").model, plain
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda name: name.replace("language_model.", "language_model._orig_mod.", 1),
        lambda name: (
            "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module.")
        ),
        lambda name: "model." + name,
        lambda name: "model.module." + name,
        lambda name: "module.model." + name,
    ],
)
def test_wrappers_inside_names_are_taken_out(folder, change):
    """A model saved from FSDP, torch.compile or checkpointing would be refused for the names that
    these insert."""
    plain = load(REFERENCE / "plain", dtype="float32").model
    assert same_weights(load(renamed(folder, change), dtype="float32").model, plain)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model."])
def test_a_wrapper_before_some_names_is_refused(folder, wrapper):
    """A half-renamed file would give a long list of missing and unexpected tensors instead of their
    cause."""
    renamed(folder, lambda name: wrapper + name if "layers.1." in name else name)
    message = refusal(folder)
    assert message.startswith(f"{folder / SINGLE_NAME}: ")
    assert f" names begin with a wrapper, such as {wrapper}" in message
    assert "\n" not in message


def test_two_names_that_are_one_without_wrappers_are_refused(folder):
    """Once its wrapper is taken out, one tensor would overwrite another without an error."""
    tensors = stored(folder)
    tensors[QUERY.replace("layers.1.", "layers.1._orig_mod.")] = tensors[QUERY]
    store(tensors, folder)
    assert "are both language_model.layers.1.self_attn.q_proj.weight; remove one" in refusal(folder)


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model", "module"])
def test_a_bin_may_hold_its_state_dict_inside_another(folder, nest):
    """A checkpoint of a training loop, with epoch and optimizer beside the weights, would be
    refused."""
    tensors = stored(folder)
    (folder / SINGLE_NAME).unlink()
    rest = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}, "lr": [1e-3]}}
    torch.save(
        {nest: {f"module.{name}": w for name, w in tensors.items()}, **rest}, folder / BIN_NAME
    )
    assert same_weights(
        load(folder, dtype="float32").model, load(REFERENCE / "plain", dtype="float32").model
    )


def test_a_lora_inside_the_weights_is_not_called_unknown_tensors(folder):
    """A list of unknown tensors does not tell a user that a LoRA has yet to be merged."""
    store(
        stored(folder) | {QUERY.replace(".weight", ".lora_A.default.weight"): torch.zeros(2, 64)},
        folder,
    )
    assert "holds a LoRA that was not merged" in refusal(folder)


# --- a tower that only its tensors describe -------------------------------------------------------

BLOCK = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
}


def tower_of(width: int, depth: int, mlp: int, patch: int, side: int) -> dict[str, torch.Tensor]:
    """CLIP's vision half by the original's names, without memory: one number, seen many times."""
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
    }
    shapes["embeddings.position_embedding.weight"] = ((side // patch) ** 2 + 1, width)
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(depth):
        for name in BLOCK:
            n, c = {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}.get(name, (width, width))
            shapes |= {
                f"encoder.layers.{i}.{name}.weight": (n, c),
                f"encoder.layers.{i}.{name}.bias": (n,),
            }
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
    return {
        f"vision_tower.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()
    }


class Shapes:
    """As much of a Checkpoint as `settle` asks for."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors, self.folder, self.rows, self.notes = tensors, Path("folder"), None, []

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


def unstated(**fields) -> LlavaConfig:
    return LlavaConfig(vision=CLIP_LARGE_336, text=TextConfig(), vision_stated=False, **fields)


@pytest.mark.parametrize(
    ("sizes", "patches"),
    [
        ((768, 12, 3072, 32, 224), 49),  # ViT-B/32
        ((768, 12, 3072, 16, 224), 196),  # ViT-B/16
        ((1024, 24, 4096, 14, 224), 256),  # ViT-L/14
        ((1024, 24, 4096, 14, 336), 576),  # ViT-L/14-336
    ],
)
def test_a_tower_that_config_json_does_not_describe_is_measured(sizes, patches):
    """One of 224 pixels was refused as having another shape than config.json says, which said
    nothing."""
    width, depth, mlp, patch, side = sizes
    vision = settle(unstated(), Shapes(tower_of(*sizes))).vision
    assert vision == VisionConfig(width, mlp, depth, width // 64, side, patch)
    assert vision.num_patches == patches


def test_blocks_that_no_feature_needs_may_be_absent():
    """A tower saved without its last block, which LLaVA does not use, would be taken for another
    tower."""
    tower = {
        k: v for k, v in tower_of(1024, 23, 4096, 14, 336).items() if "post_layernorm" not in k
    }
    assert settle(unstated(), Shapes(tower)).vision == CLIP_LARGE_336


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "/data/CLIP-ViT-Large", None])
def test_a_tower_whose_name_says_what_it_is_gets_no_note(name):
    """Users of OpenAI's own towers would be warned about a guess that is none."""
    shapes = Shapes(tower_of(1024, 24, 4096, 14, 224))
    settle(unstated(vision_tower_name=name), shapes)
    assert shapes.notes == []


@pytest.mark.parametrize("name", ["./my_tower", "someone/CLIP-L-14-336"])
def test_a_tower_known_by_its_size_alone_is_noted(name):
    """Whether its activation is quick_gelu stands in no tensor."""
    shapes = Shapes(tower_of(1024, 24, 4096, 14, 224))
    settle(unstated(vision_tower_name=name), shapes)
    (note,) = shapes.notes
    assert name in note and "taken for one of OpenAI's CLIPs (quick_gelu" in note


def test_what_config_json_says_of_a_tower_stands():
    """A tower that config.json describes would be described anew from its tensors."""
    config = replace(unstated(), vision_stated=True)
    assert settle(config, Shapes(tower_of(768, 12, 3072, 32, 224))).vision == CLIP_LARGE_336


@pytest.mark.parametrize(
    ("sizes", "fields", "found"),
    [
        ((1280, 2, 5120, 14, 224), {}, "its width 1280 does not say how many heads"),
        ((100, 2, 400, 14, 224), {}, "its width 100 does not say how many heads"),
        ((192, 4, 384, 14, 126), {}, "its width 192 does not say how many heads"),
        ((512, 8, 2048, 16, 224), {}, "its width 512 does not say how many heads"),
        (
            (768, 12, 3072, 16, 224),
            {"vision_tower_name": "laion/CLIP-ViT-B-16"},
            "laion/CLIP-ViT-B-16, which is not",
        ),
        ((768, 12, 3072, 16, 224), {"feature_layer": 20}, "vision feature layer is 20"),
    ],
)
def test_what_a_tower_s_tensors_do_not_say_is_refused(sizes, fields, found):
    """A guessed number of heads, or another CLIP taken for OpenAI's, would give wrong features
    without an error."""
    with pytest.raises(ValueError, match=found):
        settle(unstated(**fields), Shapes(tower_of(*sizes)))


def test_positions_that_are_no_square_are_refused():
    """A square root rounded down would make up a picture size that the tower does not have."""
    tower = tower_of(768, 1, 3072, 16, 224)
    tower["vision_tower.embeddings.position_embedding.weight"] = torch.empty(
        196, 768, device="meta"
    )
    with pytest.raises(
        ValueError, match=r"196 positions and patches of shape .* do not say how large"
    ):
        settle(unstated(), Shapes(tower))


def test_a_folder_without_vision_config_is_opened_by_its_tower_s_shapes(tmp_path, write_dialect):
    """Of the toy's 32 numbers nobody knows how many heads they are: the line says what config.json
    lacks."""
    folder = write_dialect("original", tmp_path / "model")["weights"]
    change_config(folder, vision_config=None)
    assert (
        f"config.json does not describe the vision tower {CLIP_NAME}, and its width 32"
        in refusal(folder)
    )
    wide = {name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model."): torch.zeros(t.shape)
            for name, t in tower_of(768, 1, 96, 14, 56).items()}  # fmt: skip
    tensors = {name: t for name, t in stored(folder).items() if "vision_tower" not in name} | wide
    first = next(name for name in tensors if "mm_projector.0.weight" in name)
    store(tensors | {first: torch.zeros(len(tensors[first]), 768)}, folder)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    change_config(folder, mm_vision_select_layer=1)
    vision = load(folder).model.config.vision
    assert vision == VisionConfig(768, 96, 12, 12, 56, 14)
    assert inspect_folder(folder).picture == {"side": 56, "aspect": "pad"}


# --- what the system refuses ----------------------------------------------------------------------


@pytest.fixture
def cannot_open(monkeypatch):
    """`cannot_open(path, number)`: the system refuses to open one file, also to root, who may read
    everything."""

    def arrange(path: Path, number: int) -> None:
        opening = io.open

        def refuse(file, *rest, **named):
            if file == path:
                raise OSError(number, os.strerror(number), str(file))
            return opening(file, *rest, **named)

        monkeypatch.setattr(io, "open", refuse)
        monkeypatch.setattr(Path, "open", refuse)  # Python 3.10 has made it of io.open before

    return arrange


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        SINGLE_NAME,
        "tokenizer.model",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, cannot_open, name):
    """The advice was to download it again."""
    path = folder / name
    cannot_open(path, errno.EACCES)
    message = refusal(folder, PermissionError)
    assert (
        message
        == f"{path}: may not be read (Permission denied); its owner can allow it with: chmod u+r {path}"
    )
    assert inspect_folder(folder).problems == [message]


@pytest.mark.skipif(os.name != "posix", reason="modes of Unix")
@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME, "tokenizer.model", ""])
@pytest.mark.parametrize("mode", [0o600, 0o300, 0])
def test_missing_rights_say_where_and_what_to_do(folder, name, mode):
    """A file that may not be read would be called missing or damaged, and be downloaded again."""
    path = folder / name
    mode = mode & 0o300 if name else mode
    path.chmod(mode)
    try:
        if os.access(path, os.R_OK | (0 if name else os.X_OK)):
            pytest.skip("root may read everything")
        message = refusal(folder, PermissionError)
    finally:
        path.chmod(0o700)
    assert "may not be read" in message
    assert re.search(rf"chmod u\+r?x? {re.escape(str(path))}$", message)


@pytest.mark.parametrize("number", [errno.EIO, errno.ELOOP, errno.ENAMETOOLONG])
def test_a_failing_disk_is_not_a_damaged_file(folder, cannot_open, number):
    """A user would download a sound file again because the disk or the path failed."""
    cannot_open(folder / SINGLE_NAME, number)
    message = refusal(folder, OSError)
    assert message.startswith(f"{folder / SINGLE_NAME}: {os.strerror(number)}; ")
    assert "download" not in message


def test_a_name_that_is_too_long_is_no_missing_folder():
    """A text pasted in the place of a path would be looked for in the hub cache."""
    message = refusal(Path("x" * 300), OSError)
    assert message.startswith("x" * 300 + ": File name too long; ")
