"""The trace: that its shapes are those of the walk-through, that watching changes nothing, and
where two runs part."""

import base64
import io
import json
import re
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from bounds import assert_same_in_float64
from paths import REFERENCE, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import minillava
from minillava.assistant import Assistant
from minillava.attention import fused
from minillava.cache import KVCache
from minillava.cli import arguments as cli
from minillava.cli.doors import enter
from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig, VisionConfig
from minillava.generate.generation import generate
from minillava.image import ImageProcessor
from minillava.inspection.doctor import TOLERANCE
from minillava.llava import Llava
from minillava.look.run import look
from minillava.loop import Options
from minillava.prompt import DEFAULT_PROMPT
from minillava.templates import TEMPLATES
from minillava.tokenizer import Tokenizer
from minillava.tracing.compare import difference
from minillava.tracing.recorder import Record, Recorder, summarise
from minillava.tracing.run import trace

main = partial(enter, "trace")

WEIGHTS = REFERENCE / "plain"
PICTURES = REFERENCE / "pictures"
BASE = [
    "-i",
    str(PICTURES / "landscape.png"),
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "-n",
    "4",
    "-p",
    "What <b>?",
]


@pytest.fixture(scope="module")
def picture():
    return Image.open(PICTURES / "landscape.png").convert("RGB")


@pytest.fixture
def run(run_main):
    """`run(*arguments)`: the command in this process -> (exit status, stdout, stderr)."""
    return partial(run_main, main, "-m", WEIGHTS, *BASE)


@pytest.fixture
def out(run):
    """`out(*arguments)`: stdout of a run that must succeed with nothing on stderr."""

    def checked(*arguments: str) -> str:
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        return out

    return checked


@pytest.fixture
def rows(out):
    """`rows(*arguments)`: the JSON lines of a run."""
    return lambda *arguments, **options: [
        json.loads(line) for line in out("--json", *arguments, **options).splitlines()
    ]


def record(assistant, picture, **options) -> list[Record]:
    records = []
    chosen = assistant.options(max_new_tokens=3)
    trace(
        assistant, [picture], "What is it?", chosen, lambda one, _: records.append(one), **options
    )
    return records


def test_python_takes_what_look_takes(assistant, picture, tmp_path, capsys):
    """It wanted opened pictures and an Options, `look` a path and keywords."""
    path = tmp_path / "x.png"
    picture.save(path)
    expected, found = record(assistant, picture), []
    same = [lambda one, _: found.append(one)]
    trace(assistant, path, "What is it?", consume=same[0], max_new_tokens=3)
    assert found == expected
    found.clear()
    trace(
        assistant,
        str(path),
        "What is it?",
        Options(max_new_tokens=8),
        same[0],
        max_new_tokens=3,
        steps=(0, 1),
    )
    assert found == expected
    trace(assistant, path, "What is it?", max_new_tokens=3)
    assert "input_ids" in capsys.readouterr().out
    by_name = look(assistant, path, "What is it?", max_new_tokens=3)
    assert (
        look(assistant, [picture], "What is it?", Options(max_new_tokens=3)).answer
        == by_name.answer
    )
    with pytest.raises(ValueError, match="2 pictures"):
        look(assistant, [picture, picture], "What is it?")


def shapes(records, step=0) -> dict[str, list[int]]:
    return {r.name: r.shape for r in records if r.step in (step, None) and r.shape is not None}


# --- the walk-through -----------------------------------------------------------------------------


@pytest.mark.slow
def test_shapes_at_true_widths_are_those_of_the_walk_through(llama_tokenizer):
    """LLaVA-1.5-7B's widths with random numbers; of its layers only as many as a test has time for,
    and a narrow feed-forward layer, which the walk-through does not look into."""
    tower = {**vars(CLIP_LARGE_336), "num_hidden_layers": 3, "intermediate_size": 64}
    text = TextConfig(
        vocab_size=32064, intermediate_size=64, num_hidden_layers=1, max_position_embeddings=4096
    )
    config = LlavaConfig(VisionConfig(**tower), text)
    with torch.device("meta"):
        model = Llava(config, fused)
    model.to_empty(device="cpu")
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            flat[start : start + len(noise)] = noise[: len(flat) - start]
    processor = ImageProcessor(336)
    assistant = Assistant(model, Tokenizer(llama_tokenizer), processor, TEMPLATES["llava_v1"])
    records = []
    trace(
        assistant,
        [Image.new("RGB", (500, 334), "teal")],
        DEFAULT_PROMPT,
        Options(max_new_tokens=2),
        lambda one, _: records.append(one),
    )
    first, second = shapes(records), shapes(records, step=1)
    layer = "language_model.layers.0"
    expected = {  # of the notes, by where they look
        "input_ids": [1, 50],
        "pixel_values": [1, 3, 336, 336],
        "vision_tower": [1, 576, 1024],
        "projector": [1, 576, 4096],
        "embeds": [1, 625, 4096],
        f"{layer}.self_attn.q": [1, 32, 625, 128],
        f"{layer}.self_attn.k": [1, 32, 625, 128],
        f"{layer}.self_attn.v": [1, 32, 625, 128],
        f"{layer}.cache.keys": [1, 32, 625, 128],
        f"{layer}.self_attn.attention_weights": [1, 32, 625, 625],
        f"{layer}.self_attn": [1, 625, 4096],
        "vision_tower.embeddings": [1, 577, 1024],  # and what they do not print
        "vision_tower.encoder.layers.1": [1, 577, 1024],
        layer: [1, 625, 4096],
        "logits": [1, 1, 32064],
    }
    assert {name: first[name] for name in expected} == expected
    cached = {
        f"{layer}.self_attn.q": [1, 32, 1, 128],
        f"{layer}.self_attn.k": [1, 32, 1, 128],
        f"{layer}.cache.keys": [1, 32, 626, 128],
        f"{layer}.cache.values": [1, 32, 626, 128],
        f"{layer}.self_attn.attention_weights": [1, 32, 1, 626],
        f"{layer}.self_attn": [1, 1, 4096],
    }
    assert {name: second[name] for name in cached} == cached
    named = {r.name: r for r in records}
    ids = named["input_ids"].value
    assert [ids[i] for i in (0, 1, 34, 35, 36, 37, 49)] == [
        [1, "<s>"], [319, "▁A"], [29871, "▁"], [-200, "<image>"], [29871, "▁"], [13, "<0x0A>"], [29901, ":"],
    ]  # fmt: skip
    assert named["image_spans"].value == [[35, 611]]
    assert named["picture.0"].value == "500 x 334 RGB"


@pytest.mark.slow
def test_all_32_layers_of_7b_without_its_weights():
    """The real depth on the meta device, which computes shapes only."""
    config = LlavaConfig(CLIP_LARGE_336, TextConfig(vocab_size=32064, max_position_embeddings=4096))
    records, steps = [], (0, 1, 2)
    with torch.device("meta"), torch.no_grad():
        model = Llava(config, fused)
        cache = KVCache(config.text, 1, 627, dtype=torch.float32, device="meta")
        with Recorder(model, lambda one, _: records.append(one), "everything", None, steps):
            patches = model.encode_images(torch.empty(1, 3, 336, 336))
            model.language_model(
                torch.cat([torch.empty(1, 49, 4096), patches], 1), None, cache, last_only=True
            )
            for _ in steps[1:]:
                model.language_model(torch.zeros(1, 1, dtype=torch.long), None, cache)
    for step, queries, keys in ((0, 625, 625), (1, 1, 626), (2, 1, 627)):
        found = shapes(records, step)
        for layer in range(32):
            prefix = f"language_model.layers.{layer}"
            assert found[f"{prefix}.self_attn.attention_weights"] == [1, 32, queries, keys]
            assert found[f"{prefix}.cache.values"] == [1, 32, keys, 128]
            assert found[f"{prefix}.mlp.gate_proj"] == [1, queries, 11008]
        assert f"{prefix[:-2]}32" not in found
    assert [
        name
        for name in shapes(records)
        if re.fullmatch(r"vision_tower\.encoder\.layers\.\d+", name)
    ] == [f"vision_tower.encoder.layers.{i}" for i in range(23)]


def test_records_come_in_the_order_of_the_data(assistant, picture):
    """A reader who follows the data would find a stage after the one it feeds."""
    names = [r.name for r in record(assistant, picture)]
    tower, layer = "vision_tower.", "language_model.layers.0"
    order = ["config", "question", "conversation", "prompt", "input_ids"]
    order += ["picture.0", "picture.0.square", "pixel_values"]
    order += [
        f"{tower}embeddings.patch_embedding",
        f"{tower}encoder.layers.0",
        f"{tower}encoder.layers.1",
    ]
    order += [
        "vision_tower",
        "projector",
        "embeds",
        "image_spans",
        "attention_mask",
        "positions",
        "mask",
    ]
    order += [f"{layer}.self_attn.q", f"{layer}.cache.keys", f"{layer}.self_attn.attention_weights"]
    order += [
        f"{layer}.self_attn",
        f"{layer}.mlp",
        layer,
        "language_model.layers.1",
        "language_model.norm",
    ]
    order += ["logits", "top", "token"]
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert names[-1] == "answer"


@pytest.mark.numeric
def test_numbers_are_those_of_the_tensors(picture):
    """The trace would show numbers that the model did not compute with."""
    assistant = minillava.load(WEIGHTS, device="cpu", dtype="float64")
    made = generate(
        assistant.model,
        [assistant.tokenizer.encode(assistant.prompt("What is it?"))],
        assistant.image_processor([picture]),
        max_new_tokens=3,
        record=("attentions", "hidden_states", "logits"),
    )
    tensors = {}
    trace(
        minillava.load(WEIGHTS, device="cpu", dtype="float64", attention="eager"),
        [picture],
        "What is it?",
        Options(max_new_tokens=3),
        lambda one, tensor: tensors.update({one.key: tensor}),
    )
    for step in (0, 1):
        for layer in (0, 1):
            seen = tensors[f"{step}/language_model.layers.{layer}.self_attn.attention_weights"]
            assert_same_in_float64(seen, made.attentions[step][layer])
        assert_same_in_float64(
            tensors[f"{step}/language_model.layers.0"], made.hidden_states[step][1]
        )
        assert_same_in_float64(tensors[f"{step}/logits"][:, -1], made.logits[step])
        assert int(tensors[f"{step}/token"]) == int(made.sequences[0, step])
    assert tensors["0/positions"].tolist() == [list(range(tensors["0/positions"].shape[1]))]
    cached = tensors["1/language_model.layers.1.cache.keys"]
    assert torch.equal(cached[:, :, :-1], tensors["0/language_model.layers.1.cache.keys"])
    assert torch.equal(cached[:, :, -1:], tensors["1/language_model.layers.1.self_attn.k"])
    values = tensors["1/language_model.layers.1.cache.values"]
    assert torch.equal(values[:, :, -1:], tensors["1/language_model.layers.1.self_attn.v"])


def test_positions_of_a_padded_row_count_what_is_real(assistant):
    """The positions of a padded row would count its padding."""
    rows, found = (
        [
            assistant.tokenizer.encode("USER: Hi"),
            assistant.tokenizer.encode("USER: What is it, then?"),
        ],
        {},
    )
    short, long = map(len, rows)
    assert short < long
    with Recorder(
        assistant.model, lambda one, x: found.update({one.key: x}), "modules", None, (0, 1)
    ):
        generate(assistant.model, rows, max_new_tokens=2, min_new_tokens=2)
    padded = [0] * (long - short) + list(range(short))
    assert found["0/positions"].tolist() == [padded, list(range(long))]
    assert found["1/positions"].tolist() == [[short], [long]]


def test_a_summary_is_right_and_is_json():
    """A NaN in a tensor would make the output no JSON, and an empty tensor would fail."""
    x = torch.tensor([[1.0, -2.0, 4.0], [9.0, 0.0, 0.0]])
    assert summarise(x) == {
        "shape": [2, 3], "dtype": "float32", "min": -2.0, "mean": 2.0, "max": 9.0, "first": [1.0, -2.0, 4.0]
    }  # fmt: skip
    assert summarise(torch.tensor([5, 13563]))["first"] == [5, 13563]
    assert summarise(torch.ones(3, dtype=torch.bool))["mean"] == 1.0
    assert summarise(torch.empty(0, 3)) == {"shape": [0, 3], "dtype": "float32"}
    broken = summarise(torch.tensor([float("nan"), float("inf")]))
    assert json.loads(json.dumps(broken, allow_nan=False))["first"] == ["nan", "inf"]


def test_every_record_names_the_line_that_made_it(assistant, picture):
    """A stage would name a line of the tracer, or one that has moved."""
    lines = {}
    for one in record(assistant, picture, depth="everything"):
        file, _, number = one.source.partition(":")
        lines[one.name] = (
            (ROOT / "minillava" / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        )
    layer = "language_model.layers.1"
    for name, words in (
        ("projector", "self.projector("),
        ("vision_tower", "self.vision_tower("),
        ("vision_tower.embeddings.patch_embedding", "self.patch_embedding("),
        ("projector.linear_2", "linear_"),
        (f"{layer}.self_attn.q_proj", "proj(x)"),
        (f"{layer}.self_attn.q", "def apply_rotary"),
        (f"{layer}.self_attn.attention_weights", "def eager"),
        (f"{layer}.cache.keys", "def update"),
        (f"{layer}.mlp.down_proj", "self.down_proj("),
        (f"{layer}.mlp", "self.mlp("),
        (layer, "layer("),
        ("logits", "def head"),
        ("embeds", "def splice"),
        ("input_ids", "def encode"),
        ("prompt", "def render"),
    ):
        assert words in lines[name], name


# --- watching changes nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("attend", ["eager", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_same_to_the_last_bit(attend, dtype, picture):
    """Tracing would change the answer that it explains."""
    assistant = minillava.load(WEIGHTS, device="cpu", dtype=dtype, attention=attend)
    ids = assistant.tokenizer.encode(assistant.prompt("What is it?"))
    pixels = assistant.image_processor([picture])
    expected = generate(assistant.model, [ids], pixels, max_new_tokens=3, record=("logits",))
    found = []

    def consume(one, tensor):
        if one.name == "logits":
            found.append(tensor.float()[:, -1])

    options = Options(max_new_tokens=3)
    trace(
        assistant, [picture], "What is it?", options, consume, depth="everything", traced=(0, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected.logits, strict=True))
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in assistant.model.modules()]
    assert not any(hooks)


def test_hooks_go_even_when_something_breaks(assistant, picture):
    """A closed pipe would leave the model with hooks that fail."""

    def consume(one, tensor):
        if one.name == "mask":
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        trace(assistant, [picture], "What is it?", Options(), consume)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in assistant.model.modules())


def test_attention_weights_are_let_go_one_by_one(assistant, picture):
    """The attention weights of all layers would be held at once, gigabytes at 7B."""
    alive = []

    def consume(one, tensor):
        if one.name.endswith("attention_weights"):
            assert [ref for ref in alive if ref() is not None] == []
            alive.append(weakref.ref(tensor))

    trace(assistant, [picture], "What is it?", Options(max_new_tokens=3), consume)
    assert len(alive) == 4


# --- what is shown --------------------------------------------------------------------------------


def test_depth_layer_and_step_choose(rows):
    """--depth, --layer or --step would be accepted and show everything."""

    def names(*arguments):
        return [row["name"] for row in rows(*arguments) if row.get("step") is not None]

    outline, modules, everything = (
        set(names("--depth", d)) for d in ("outline", "modules", "everything")
    )
    assert outline < modules < everything
    assert not any("layers" in name for name in outline)
    assert {"language_model.layers.1.mlp.up_proj", "cos"} <= everything - modules
    layers = {name for name in names("--layer", "1") if "layers" in name}
    assert layers
    assert all("layers.1" in name for name in layers)
    assert {row.get("step") for row in rows("--step", "2,3")} == {None, 2, 3}
    assert names("--step", "2").count("token") == 1


def test_text_marks_the_shapes_that_change(out, rows):
    """The star would miss a shape that the cache changes, or mark all of them."""
    text = out()
    marked = re.findall(r"^  (\S+) +\* (\[.*?\])", text, re.MULTILINE)
    assert ("self_attn.q", "[1, 4, 1, 16]") in marked
    before = text.split("== step 1 (cached decode)")[0]
    assert not re.search(r"^  \S+ +\* \[", before, re.MULTILINE)
    found = {(row.get("step"), row["name"]): row for row in rows()}
    name = "language_model.layers.0.self_attn.attention_weights"
    assert found[1, name]["was"] == found[0, name]["shape"]
    assert "was" not in found[1, "logits"]
    assert len(found[0, "top"]["value"]) == 5
    assert found[0, "token"]["value"][0] == found[0, "top"]["value"][0][:2]
    assert max(map(len, text.splitlines())) <= 160


def test_the_summary_is_the_answer(rows, assistant):
    """The traced answer would be another than ask gives."""
    last = rows()[-1]
    assert last["name"] == "answer"
    assert last["value"]["text"] == assistant.ask(
        PICTURES / "landscape.png", "What <b>?", max_new_tokens=4
    )
    assert len(last["value"]["ids"]) == 4


def test_a_step_that_never_came_is_said(run):
    """A step after the answer's end would be left out without a word."""
    status, _, err = run("--step", "0,9")
    assert (status, err) == (0, "note: the answer ended after 4 token(s): there is no step 9\n")


def test_without_a_picture(run, capsys):
    """A question without a picture would be an error in the trace."""
    capsys.readouterr()
    base = [word for word in BASE if word not in BASE[:2]]
    assert main(["-m", str(WEIGHTS), *base, "--depth", "everything"]) == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert "[0, 3, 56, 56]" in found.out


def test_picture_and_question_come_from_stdin_too(capsys, monkeypatch, out, tmp_path):
    """The second run of --compare would find stdin empty."""
    expected, picture = out(), (PICTURES / "landscape.png").read_bytes()
    for flag, content in (("-p", b"What <b>?\n"), ("-i", picture)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        given = list(BASE)
        given[given.index(flag) + 1] = "-"
        assert main(["-m", str(WEIGHTS), *given]) == 0
        assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What <b>?\n")))
    assert (
        main(["-m", str(WEIGHTS), *BASE, "-p", "-", "--compare", "dtype=float32", "dtype=float32"])
        == 0
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"(\d+) of \1 tensors equal", last)


def test_a_layer_that_only_the_tower_has(tmp_path, assistant, picture):
    """The decoder has fewer layers than the tower."""
    deep = minillava.load(
        changed_config(tmp_path, vision_feature_layer=-1), device="cpu", dtype="float32"
    )
    names = {one.name for one in record(deep, picture, layers=[2])}
    assert "vision_tower.encoder.layers.2" in names
    with pytest.raises(
        ValueError,
        match="no layer 3: the language model has layers 0 to 1, the vision tower runs 3",
    ):
        record(deep, picture, layers=[3])


def changed_config(folder: Path, **changes) -> Path:
    """The stored checkpoint with another config.json."""
    folder = Path(shutil.copytree(WEIGHTS, folder / "changed"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


def squares(page: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """((x, y), the numbers of the title) of every patch in a page."""
    found = re.findall(r'<rect x="(\d+)" y="(\d+)" [^>]*><title>(.*?)</title>', page)
    return [((int(x), int(y)), tuple(map(int, re.findall(r"\d+", title)))) for x, y, title in found]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_patch_is_at_its_place_in_picture_and_text(rows, out, tmp_path, assistant, picture, kept):
    """A class token that is kept would shift every patch of the page by one."""
    weights = changed_config(tmp_path, vision_feature_select_strategy="full" if kept else "default")
    out("-m", weights, "--html", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    named = {row["name"]: row for row in rows("-m", weights)}
    ((start, end),), vision = named["image_spans"]["value"], assistant.model.config.vision
    side, patch = vision.image_size // vision.patch_size, vision.patch_size
    assert end - start == side * side + kept
    expected = [
        (
            (column * patch, row * patch),
            (row * side + column, row, column, start + kept + row * side + column),
        )
        for row in range(side)
        for column in range(side)
    ]
    assert squares(page) == expected
    assert f"at positions {start + kept} to {end - 1}<" in page
    (_, given), (_, seen) = [
        (kind, Image.open(io.BytesIO(base64.b64decode(data))).size)
        for kind, data in re.findall(r'"data:image/(\w+);base64,(.*?)"', page)
    ]
    assert given == picture.size
    assert seen == (vision.image_size, vision.image_size)


def test_the_page_is_whole_and_needs_nothing(out, tmp_path, assistant):
    """A question with HTML in it would be run, or the page need the net to be read."""
    page = tmp_path / "trace.html"
    answer = out("--html", page, "-i", PICTURES / "portrait.png", "-p", "<image> or <image> <b>?")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert set(re.findall(r'(?:src|href)="(.{10})', text)) == {"data:image"}
    assert "<b>?" not in text  # what a user types is text
    assert "&lt;b&gt;?" in text
    side = assistant.model.config.vision.image_size // assistant.model.config.vision.patch_size
    assert text.count("<rect ") == 2 * side * side
    assert text.count("<details") == text.count("</details>") > 10
    assert "language_model" not in re.sub(r"<title>.*?</title>", "", text)  # short names
    assert answer.strip()
    assert 'name="viewport"' in text
    assert "print-color-adjust: exact" in text
    assert "prefers-color-scheme: dark" in text
    assert "count from 0, from the top left" in text


# --- two runs -------------------------------------------------------------------------------------


def parted(rows) -> tuple:
    """The summary of a comparison in short: (step, name) where they part, and how many are equal,
    of how many."""
    last = rows[-1]
    first = last["first"] and (last["first"]["step"], last["first"]["name"])
    return first, last["equal"], last["compared"]


def test_a_run_equals_itself(rows, out):
    """Two equal runs would differ, so that no comparison could be trusted."""
    found = rows("--compare", "dtype=float32", "dtype=float32", "--depth", "everything")
    first, equal, compared = parted(found)
    assert (first, equal) == (None, compared)
    assert compared == len(found) - 1 > 80
    last = out("--compare", "dtype=float32", "dtype=float32", "--depth", "outline").splitlines()[-1]
    assert re.fullmatch(r"(\d+) of \1 tensors equal", last)


def test_one_changed_weight_is_found(rows, tmp_path):
    """What somebody who ports LLaVA wants: the first wrong stage, by name."""
    changed = Path(shutil.copytree(WEIGHTS, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    name = next(
        name
        for name in tensors
        if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name
    )
    tensors[name][0] += 0.01
    save_file(tensors, changed / "model.safetensors")
    found = rows("--compare", f"weights={WEIGHTS}", f"weights={changed}", "--depth", "everything")
    assert parted(found)[0] == (0, "language_model.layers.1.mlp.up_proj")
    assert found[-1]["first"]["source"].startswith("llama.py:")
    before = [
        row
        for row in found[:-1]
        if row["name"].startswith("language_model.layers.0") and row["step"] == 0
    ]
    assert before
    assert all(row["max"] == 0 for row in before)


def test_attention_functions_part_by_rounding_alone(rows):
    """Rounding would count as a fault, or a fault as rounding."""
    found = rows("--compare", "attention=eager", "attention=fused")
    first, equal, compared = parted(found)
    assert first[1].startswith("vision_tower.encoder.layers.")
    assert 0 < equal < compared
    limit = TOLERANCE[torch.float32]  # what rounding explains
    assert all(row["relative"] < limit for row in found[:-1])
    tolerant = rows("--compare", "attention=eager", "attention=fused", "--tolerance", limit)
    assert parted(tolerant) == (None, compared, compared)


def test_differences_are_the_largest_and_of_the_larger():
    """The difference would depend on which run comes first, or a NaN count as equal."""
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 8.0])
    for found in (difference(a, b), difference(b, a)):
        assert (found["max"], found["relative"]) == pytest.approx((4, 4 / 73**0.5))
    infinite = torch.tensor([float("-inf")])
    a, b = torch.cat([a, infinite]), torch.cat([b, infinite])
    assert difference(a, b)["relative"] == pytest.approx(4 / 73**0.5)  # -inf: what a filter has cut
    assert difference(a, a)["relative"] == 0
    for other in (a.nan_to_num(neginf=0.0), a * float("nan")):
        found = difference(a, other)
        assert isinstance(found["max"], str)
        assert isinstance(found["relative"], str)


def test_whole_numbers_are_equal_or_not():
    """Between ids, "max |A-B| 116, relative 0.28" says nothing."""
    a, b = torch.tensor([[1, 500, 7]]), torch.tensor([[1, 3, 8]])
    found = difference(a, b)
    assert (found["different"], found["max"], found["relative"]) == (2, None, None)
    assert difference(a, a.int()) | {"dtypes": 0, "shapes": 0} == {
        "dtypes": 0,
        "shapes": 0,
        "max": 0.0,
        "relative": 0.0,
    }
    assert "different" not in difference(a, b[:, :2])
    assert "different" not in difference(a.float(), b.float())


def test_ids_that_differ_are_counted(out, rows):
    """A tolerance is about numbers: one id of fifty was within 0.05."""
    flags = ["-p", "Is it red?", "--depth", "outline", "--compare", "system=Be 1", "system=Be 2"]
    line = next(line for line in out(*flags).splitlines() if line.startswith("input_ids"))
    assert re.search(r" (\d+) of (\d+) differ  <- first$", line)
    row = rows(*flags, "--tolerance", "0.9")[0]
    assert (row["name"], row["max"]) == ("input_ids", None)
    assert 0 < row["different"] < row["shapes"][0][1]


def test_a_path_in_a_setting_may_have_commas(out, tmp_path):
    """A folder's name with a comma would be cut into two settings."""
    folder = tmp_path / "a,b, c"
    folder.symlink_to(WEIGHTS)
    text = out(
        "--depth",
        "outline",
        "--compare",
        f"weights={folder},dtype=float32",
        f"dtype=float32,weights={folder}",
    )
    assert re.search(r"^(\d+) of \1 tensors equal$", text, re.MULTILINE)


def test_a_file_may_have_the_sign_of_a_setting_in_its_name(out, tmp_path):
    """A file named seed=1.safetensors would be called an unknown setting."""
    path = tmp_path / "seed=1.safetensors"
    out("--depth", "outline", "--save", path)
    assert re.search(r"^(\d+) of \1 tensors equal$", out("--depth", "outline", "--compare", path, "dtype=float32"),
                     re.MULTILINE)  # fmt: skip


def test_what_there_is_to_know_about_the_weights_is_said_once(capsys):
    """Two runs said it twice."""
    picture = ["-i", str(PICTURES / "landscape.png")]
    assert (
        main(
            [
                *picture,
                "-n",
                "2",
                "--depth",
                "outline",
                "--compare",
                "attention=eager",
                "attention=fused",
            ]
        )
        == 0
    )
    assert capsys.readouterr().err.count("bundled demo model") == 1


def test_scores_behind_a_filter_are_compared(rows):
    """The infinities that a filter writes would make every score differ by NaN."""
    flags = ["--temperature", "1", "--top-k", "5", "--depth", "outline"]
    limit = TOLERANCE[torch.float32]
    found = rows("--compare", "attention=eager", "attention=fused", "--tolerance", limit, *flags)
    scores = [row["relative"] for row in found[:-1] if row["name"] == "scores"]
    assert len(scores) == 2 and max(scores) < limit
    first, equal, compared = parted(found)
    assert (first, equal) == (None, compared)


def test_pad_and_crop_part_at_the_pixels(out):
    """The first difference would be named stages too late."""
    text = out(
        "--compare", "image_aspect_ratio=pad", "image-aspect-ratio=crop", "--depth", "outline"
    )
    assert "they part first at pixel_values (image.py:" in text
    assert len(re.findall(r"<- first", text)) == 1


def test_another_prompt_has_other_shapes(out):
    """Tensors of two shapes would be an error, or be left out of the comparison."""
    text = out("--compare", "template=llava_v1", "template=llava_v0", "--depth", "outline")
    assert re.search(r"^input_ids .* B is \[1, \d+\]  <- first$", text, re.MULTILINE)


def test_after_different_tokens_nothing_is_compared(rows, tmp_path, out):
    """Steps that follow different tokens would be reported as hundreds of faults."""
    file = tmp_path / "a.safetensors"
    out("--save", file, "--step", "0,1,2", "--depth", "outline")
    tensors = load_file(file)
    tensors["1/token"] += 1
    save_file(tensors, file)
    found = rows("--compare", file, "dtype=float32", "--step", "0,1,2", "--depth", "outline")
    assert parted(found)[0] == (1, "token")
    assert found[-1]["other_token_at_step"] == 1
    assert {row["step"] for row in found[:-1]} == {None, 0, 1}


@pytest.mark.parametrize("flag", ["--save", "--html"])
def test_with_a_file_stdout_has_the_answer_alone(out, rows, tmp_path, flag):
    """--save printed the whole trace, which nobody had asked to see, and --html did not."""
    text = next(row["value"]["text"] for row in rows("--step", "0") if row["name"] == "answer")
    assert out(flag, tmp_path / "a", "--step", "0") == f"{text}\n"


def test_with_json_the_trace_is_printed_beside_what_is_saved(rows, tmp_path):
    """--save would take the trace away from a script that reads it."""
    assert rows("--step", "0", "--save", tmp_path / "a") == rows("--step", "0")
    assert (tmp_path / "a").stat().st_size > 0


def test_a_file_is_saved_whole_or_not_at_all(run, out, tmp_path, monkeypatch):
    """A full disk would leave a torn file in the place of the old one."""
    file, page = tmp_path / "a.safetensors", tmp_path / "a.html"
    out("--save", file, "--html", page, "--depth", "outline")
    assert file.stat().st_mode == page.stat().st_mode  # as readable as any other file
    before = file.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cli.os, "fsync", full)
    assert run("--save", file, "--step", "0")[0] == 1
    assert file.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [page, file]


def test_a_stored_reference(rows, out, tmp_path):
    """A reference saved by one run could not be compared with a run of another dtype."""
    file = tmp_path / "reference.safetensors"
    out("--save", file, "--layer", "0", "--step", "0")
    keys = set(load_file(file))
    assert {
        "pixel_values",
        "0/language_model.layers.0.self_attn.attention_weights",
        "0/token",
    } <= keys
    found = rows("--compare", file, "dtype=bfloat16", "--step", "0")
    assert parted(found)[0] == (0, "vision_tower.embeddings.patch_embedding")
    assert found[-1]["first"]["dtypes"] == ["float32", "bfloat16"]
    assert len(found[-1]["only_in_run"]) == 1 + 9  # layer 1 of the tower, and of the decoder
    assert not found[-1]["only_in_reference"]
    turned = rows(
        "--compare", "dtype=bfloat16", file, "--step", "0", "--layer", "0", "--depth", "outline"
    )
    assert turned[-1]["first"]["dtypes"] == ["bfloat16", "float32"]
    assert turned[-1]["only_in_reference"]


def test_the_exit_code_says_whether_two_runs_differ(run):
    """Scripts had to read the table."""
    same, other = (
        ["--compare", "dtype=float32", "dtype=float32"],
        ["--compare", "dtype=float32", "dtype=bfloat16"],
    )
    assert run(*same, "--exit-code")[0] == 0
    assert run(*other)[0] == 0
    status, out, err = run(*other, "--exit-code")
    assert (status, "<- first" in out, "error" in err) == (1, True, False)
    assert run(*other, "--tolerance", "2", "--exit-code")[0] == 0


def test_layers_and_steps_are_lists_with_ranges(rows):
    """`--layer 0-1` was refused here, and needed in look."""
    expected = rows("--layer", "0,1", "--step", "0,1,2")
    assert rows("--layers", "0-1", "--steps", "0-2") == expected
    assert rows("--layers", "all", "--steps", "0-2") == expected
    assert max(row.get("step") or 0 for row in rows("--steps", "all")) >= 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--layer", "0,2"], 1, "there is no layer 2: the language model has layers 0 to 1"),
        (["--layer", "x"], 2, "'x' is not like 3 or 0,2-4 or all"),
        (["--step", ""], 2, "'' is not like 3"),
        (
            ["--compare", "nothing.safetensors", "dtype=float32"],
            1,
            "nothing.safetensors: neither settings",
        ),
        (
            ["--compare", str(PICTURES / "tiny.png"), "dtype=float32"],
            1,
            "tiny.png: not a safetensors file",
        ),
        (
            ["--compare", "seed=1", "dtype=float32"],
            2,
            "unknown setting 'seed=1', expected NAME=VALUE with one of: weights",
        ),
        (["--compare", "dtype=float31", "dtype=float32"], 2, "invalid choice: 'float31'"),
        (["--compare", "a", "b"], 2, "--compare has two files, and nothing to run"),
        (["--compare", "dtype=float32", "dtype=float32", "--html", "x"], 2, "leave --compare out"),
        (["--html", "x", "--json"], 2, "leave one of them out"),
        (["--save", "no/such/folder/x"], 2, "no/such/folder/x: no such folder"),
        (["--layer", "3"], 1, "there is no layer 3"),
        (["--html", "x", "--save", "./x"], 2, "x is given twice"),
        (["--save", str(PICTURES)], 2, "is a folder"),
        (["--html", ""], 2, "an empty name"),
        (["--exit-code"], 2, "--exit-code is about two runs: give --compare"),
        (["--tolerance", "0.1"], 2, "--tolerance is about two runs: give --compare"),
        (
            ["--compare", "dtype=float32", "dtype=float32", "--tolerance", "nan"],
            2,
            "expected a number from 0",
        ),
        (
            ["--compare", "dtype=float32", "dtype=float32", "--tolerance", "-1"],
            2,
            "expected a number from 0",
        ),
        (["-i", "-", "-p", "-"], 2, "only one of --image and --prompt can read stdin"),
        (["-i", "absent.png", "-p", "<image> <image>"], 1, "absent.png: no such picture"),
    ],
)
def test_errors_are_one_clear_line(run, arguments, status, message):
    """A mistyped layer or setting would be a traceback, or compare something else."""
    found, out, err = run(*arguments)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert message in err


def test_nothing_in_common(run, tmp_path):
    """Two files without a common tensor would count as equal."""
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    status, _, err = run("--compare", tmp_path / "x.safetensors", "dtype=float32")
    assert (status, err.count("\n")) == (1, 1)
    assert "no tensor in common" in err


def test_a_source_line_is_not_broken_inside_its_number(run, tmp_path):
    """A narrow column showed `prompt.py:1 46`: it may break between folder and file alone."""
    path = tmp_path / "trace.html"
    assert run("--html", path, "--depth", "outline")[0] == 0
    page = path.read_text(encoding="utf-8")
    sources = re.findall(r'<td class="o">(.*?)</td>', page)
    assert any("files/<wbr>pictures.py:" in source for source in sources)
    assert all(re.fullmatch(r"(\w+/<wbr>)*\w+\.py:\d+", source) for source in sources)
    assert "td.s, td.o { overflow-wrap: break-word; }" in page
