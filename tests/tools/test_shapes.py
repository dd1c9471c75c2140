"""The bundled model: its world (tools/shapes.py), its recipe (tools/train_shapes.py) and its
weights."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import eval_shapes
import hf
import numpy as np
import pytest
import shapes
import torch
from bounds import assert_same_in_float64
from commands import environment, python
from paths import ROOT
from PIL import Image
from waiting import PATIENCE, ended, wait_until

import minillava
from minillava.config import IGNORE_INDEX
from minillava.generate.generation import generate
from minillava.prompt import render

WEIGHTS = ROOT / "weights" / "shapes"
THING = r"(?P<size>small|large) (?P<colour>\w+) (?P<shape>\w+)"


def scene(seed: object, **options) -> shapes.Scene:
    return shapes.sample_scene(random.Random(f"test/{seed}"), **options)


@pytest.fixture(scope="session")
def train_shapes():
    pytest.importorskip("tqdm", reason="training shows its progress with tqdm")
    import train_shapes

    return train_shapes


@pytest.fixture(scope="session")
def tokenizer(train_shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_shapes.train_tokenizer(path, seed=0, scenes=300)
    return train_shapes.Tokenizer(path)


@pytest.fixture(scope="session")
def bundled():
    return minillava.load(WEIGHTS, device="cpu", dtype="float32")


# --- the world ------------------------------------------------------------------------------------


def test_scenes_are_what_they_promise():
    """A scene would show the same thing twice or two in one place, so that no answer is true."""
    counts = set()
    for i in range(400):
        s = scene(i)
        pairs = [(t.shape, t.colour) for t in s.things]
        places = [t.place for t in s.things]
        assert len(set(pairs)) == len(pairs) <= shapes.MAX_OBJECTS
        assert set(pairs) <= set(shapes.TRAINING_PAIRS)
        assert places == sorted(set(places))
        assert 130 <= max(s.width, s.height) <= 260
        assert 0.79 < s.width / s.height < 1.27
        assert s == scene(i)
        counts.add(len(pairs))
    assert counts == {0, 1, 2, 3, 4}


def test_held_out_pairs_leave_every_shape_and_colour_to_training():
    """A shape or colour would be unknown to the model, or a held-out pair be shown in training."""
    assert len(shapes.HELD_OUT) == len(shapes.SHAPES)
    assert {shape for shape, _ in shapes.HELD_OUT} == set(shapes.SHAPES)
    assert len({colour for _, colour in shapes.HELD_OUT}) == len(shapes.HELD_OUT)
    for options in (eval_shapes.HELD_OUT_SCENE, {}):
        shown = {
            (t.shape, t.colour) for i in range(100) for t in scene(i, count=3, **options).things
        }
        assert bool(shown & shapes.HELD_OUT) == bool(options)


def test_training_never_names_a_held_out_pair():
    """A question would name a held-out pair, and its score would no longer be that of something
    new."""
    names = {f"{colour} {shape}" for shape, colour in shapes.HELD_OUT}
    for i in range(300):
        for dialogue in shapes.ask_any(scene(i), 5, random.Random(i)):
            assert not any(
                name in text for turn in dialogue.turns for text in turn for name in names
            )


@pytest.mark.parametrize("sharpness", [1, 3])
def test_pictures_show_what_the_scene_says(sharpness):
    """In every place the thing's colour, and about as much of it as its size allows; in the others
    none."""
    for i in range(15):
        s = scene(i)
        picture = shapes.draw(s, sharpness)
        assert picture.size == (s.width, s.height)
        pixels = np.asarray(picture).astype(int)
        at = {t.place: t for t in s.things}
        for place in range(9):
            rows, columns = (
                slice(length * k // 3, length * (k + 1) // 3)
                for length, k in ((s.height, place // 3), (s.width, place % 3))
            )
            cell = pixels[rows, columns]
            if place not in at:
                assert cell.std(axis=(0, 1)).max() < 12
                continue
            near = np.abs(cell - shapes.COLOURS[at[place].colour]).max(axis=-1) < 25
            low, high = shapes.SIZES[at[place].size]
            side = max(s.width, s.height)
            assert 0.25 * (low * side) ** 2 < near.sum() < 1.05 * (high * side) ** 2


def things_of(text: str) -> list[tuple[str, ...]]:
    """Every "large red circle at the top left" of a text as (size, colour, shape, place)."""
    places = "|".join(sorted(shapes.PLACES, key=len, reverse=True))
    return [
        (m["size"], m["colour"], m["shape"], m["at"])
        for m in re.finditer(f"{THING}(?: is)? (?P<at>{places})", text)
    ]


def names_of(thing: shapes.Thing) -> tuple[str, ...]:
    return f"{thing.colour} {thing.shape}", thing.shape, f"{thing.colour} shape"


def is_true(s: shapes.Scene, question: str, answer: str) -> bool:
    """Judges an answer from its words and the scene alone, without shapes.py's way of making it."""
    full = {(t.size, t.colour, t.shape, shapes.PLACES[t.place]) for t in s.things}
    named = {f"{t.colour} {t.shape}": t for t in s.things}
    called = {
        name: [t for t in s.things if name in names_of(t)] for t in s.things for name in names_of(t)
    }
    if answer.startswith("I see"):
        return answer == shapes.EMPTY if not full else set(things_of(answer)) == full
    if m := re.fullmatch(r"There (?:is|are) (\w+) shapes?\.", answer):
        return shapes.NUMBERS.index(m[1]) == len(full)
    if m := re.fullmatch(r"Is there (?:a|an) (\w+)( shape)?\?", question):
        return answer == (
            "Yes." if any(m[1] == (t.colour if m[2] else t.shape) for t in s.things) else "No."
        )
    if m := re.fullmatch(r"Is there (?:a|an) (\w+ \w+)(?: in this image)?\?", question):
        return answer == ("Yes." if m[1] in named else "No.")
    if m := re.fullmatch(r"What is (.+)\?", question):
        here = [thing for thing in full if thing[3] == m[1]]
        return answer == f"Nothing is {m[1]}." if not here else things_of(answer) == here
    if m := re.fullmatch(r"Which is (further left|higher up), the (.+) or the (.+)\?", question):
        winner = answer.removeprefix("The ").removesuffix(f" is {m[1]}.")
        (loser,) = {m[2], m[3]} - {winner}
        key = (lambda t: t.place % 3) if m[1] == "further left" else (lambda t: t.place // 3)
        # a name that fits two things would be no name
        (first,), (second,) = called[winner], called[loser]
        return key(first) < key(second)
    m = re.fullmatch(r"(?:The (?P<who>[\w ]+?)|It) is (?P<what>.+)\.", answer)
    meant = s.things if m["who"] is None else called[m["who"]]
    assert m["who"] is None or len(meant) == 1
    return any(m["what"] in (t.colour, t.size, shapes.PLACES[t.place]) for t in meant)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_answers_are_true(kind):
    """The model would be trained on answers that its picture contradicts."""
    asked = 0
    for i in range(150):
        s = scene(i, pairs=shapes.PAIRS)
        dialogue = shapes.ask(s, kind, random.Random(i), shapes.PAIRS)
        if dialogue is not None:
            asked += 1
            assert dialogue.kind == kind
            assert len(dialogue.turns) == (2 if kind == "follow-up" else 1)
            assert all(is_true(s, *turn) for turn in dialogue.turns), (s, dialogue)
    assert asked > 40


def test_yes_and_no_are_equally_often_true_and_no_is_hard():
    """A model that always says yes, or no where in doubt, would be right most of the time."""
    said = {"Yes.": 0, "No.": 0}
    hard = 0
    for i in range(600):
        s = scene(i, count=2)
        ((question, answer),) = shapes.ask(s, "yes/no", random.Random(i)).turns
        said[answer] += 1
        colour, shape = re.search(r"(\w+) (\w+)(?: in this image)?\?", question).groups()
        hard += answer == "No." and any(t.colour == colour or t.shape == shape for t in s.things)
    assert 250 < said["Yes."] < 350
    assert hard > 0.7 * said["No."]


# --- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parity
def test_tokenizer_has_llamas_conventions(tokenizer):
    """The bundled tokenizer would have other special ids than LLaMA's, or lose spaces and rare
    letters."""
    model = tokenizer.sentencepiece
    assert [model.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert model.pad_id() == -1
    assert tokenizer.legacy is True
    # bytes, spaces and all
    assert tokenizer.decode(tokenizer.encode("naïve  Ω 12\n ok")) == "naïve  Ω 12\n ok"
    # digit by digit
    assert [model.id_to_piece(i) for i in model.encode("12")][-2:] == ["<0x31>", "<0x32>"]


@pytest.mark.parity
def test_labels_are_the_answers_that_inference_would_give(train_shapes, tokenizer):
    """The model would be trained on the questions, too, or on prompts that inference never
    makes."""
    for i in range(20):
        for dialogue in shapes.ask_any(scene(i), 5, random.Random(i)):
            ids, labels = train_shapes.encode_dialogue(tokenizer, dialogue)
            assert ids.count(train_shapes.IMAGE_TOKEN_INDEX) == 1
            answers = " ".join(answer for _, answer in dialogue.turns)
            wanted = [label for label in labels if label != IGNORE_INDEX]
            assert tokenizer.decode(wanted) == answers
            assert wanted.count(tokenizer.eos_id) == len(dialogue.turns)
            first = labels.index(wanted[0])
            question = f"<image>\n{dialogue.turns[0][0]}"
            assert ids[:first] == tokenizer.encode(
                render(train_shapes.TEMPLATE, [(question, None)])
            )


@pytest.mark.parity
def test_patch_names_are_those_of_their_ninth(train_shapes):
    """The vision tower would be taught the thing in another place of the picture."""
    s = shapes.Scene(
        200,
        160,
        (shapes.Thing("star", "red", "small", 3), shapes.Thing("ring", "blue", "large", 8)),
        0,
    )
    names = train_shapes.patch_names(s, 9).reshape(9, 9, 4)
    words = {kind: np.array(values) for kind, values in train_shapes.NAMES.items()}
    assert (words["place"][names[0, :, 0]] == "padding").all()  # 20 of 200 pixels above the picture
    assert words["place"][names[4, 4, 0]] == "in the center"
    left, corner = (
        [str(values[i]) for values, i in zip(words.values(), patch, strict=True)]
        for patch in (names[4, 1], names[7, 8])
    )
    assert left == ["on the left", "star", "red", "small"]
    assert corner == ["at the bottom right", "ring", "blue", "large"]
    assert (
        names[4, 4, 1:] == [words["shape"].tolist().index("none"), IGNORE_INDEX, IGNORE_INDEX]
    ).all()


@pytest.mark.parity
def test_a_shared_picture_trains_as_if_each_conversation_had_its_own(train_shapes, tokenizer):
    """Conversations that share a picture would see each other, and the loss be of another model."""
    trainer = train_shapes.Trainer(tokenizer, seed=1)
    model, scenes = trainer.model.double(), [scene(i) for i in range(2)]
    dialogues = [shapes.ask_any(s, 5, random.Random(i)) for i, s in enumerate(scenes)]
    pixels = train_shapes.picture_batch([shapes.draw(s) for s in scenes], trainer.processor)
    torch.testing.assert_close(pixels, trainer.processor([shapes.draw(s) for s in scenes]))
    pixels = pixels.double()
    head, tails = train_shapes.split_dialogues(tokenizer, dialogues)
    with torch.no_grad():
        words = model.language_model.embed_tokens(torch.tensor([head] * 2))
        prefix = torch.cat([words, model.encode_images(pixels)], dim=1)
        scores, true, counts = train_shapes.answer_scores(
            model, prefix, torch.full((2,), prefix.shape[1]), tails
        )
        together = torch.nn.functional.cross_entropy(scores, true, reduction="sum")
        alone, count = 0.0, 0
        for row, several in enumerate(dialogues):
            for dialogue in several:
                ids, labels = train_shapes.encode_dialogue(tokenizer, dialogue)
                answered = sum(label != IGNORE_INDEX for label in labels)
                alone += model([ids], pixels[row : row + 1], labels=[labels]).loss * answered
                count += answered
    assert count == len(true) == len(counts)
    assert round(float((1 / counts).sum())) == sum(map(len, dialogues))
    assert_same_in_float64(together, alone)


@pytest.mark.parity
def test_training_survives_being_killed(train_shapes, tmp_path, monkeypatch, capsys):
    """Stopped in the second stage and started again, it ends with the very same weights."""

    def run(folder, *more):
        threads = torch.get_num_threads()
        small = ["--scale", "0", "--pictures", "2", "--workers", "1", "--save-every", "1", *more]
        try:
            assert train_shapes.main(["--out", str(folder), *small]) == 0
        finally:
            torch.set_num_threads(threads)

    run(tmp_path / "whole")
    saves, save = [], train_shapes.save_checkpoint

    def save_three_times(*arguments):
        save(*arguments)
        saves.append(arguments)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_shapes, "save_checkpoint", save_three_times)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "pieces")
    monkeypatch.setattr(train_shapes, "save_checkpoint", save)
    capsys.readouterr()
    run(tmp_path / "pieces")
    assert "resumed" in (said := capsys.readouterr().err) and "stage 2 (read), step 1" in said
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "pieces" / path.name).read_bytes(), path.name
    assistant = minillava.load(tmp_path / "pieces", device="cpu", dtype="float32")
    assert assistant.model.config.tokens_per_image == 81

    # The same command on what is finished trained again from nothing, over the model.
    whole = tmp_path / "whole"
    before = {path: path.read_bytes() for path in whole.iterdir()}
    asked = f"Ask it with: python -m minillava.generate -m {whole} -i {whole}/example-1.png\n"
    trained = []
    monkeypatch.setattr(train_shapes, "train", lambda *arguments: trained.append(arguments))
    capsys.readouterr()
    run(whole)
    assert (
        capsys.readouterr().out
        == f"{whole} holds a finished model; --restart trains it anew. {asked}"
    )
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    assert trained == []
    run(whole, "--restart")
    assert capsys.readouterr().out == f"{whole} holds the model. {asked}"
    assert len(trained) == 1


def test_the_card_says_how_many_turns_were_trained():
    """A third question gets nonsense, and nothing said why."""
    rng = random.Random(0)
    asked = [dialogue for seed in range(20) for dialogue in shapes.ask_any(scene(seed), 8, rng)]
    turns = max(len(dialogue.turns) for dialogue in asked)
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert turns == 2
    assert "Conversations of one or two questions" in card


@pytest.mark.parity
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the workers in /proc")
def test_two_workers_train_and_die_together(train_shapes, tmp_path):
    """Nobody goes on without the first process."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "train_shapes.py"),
        "--out",
        str(tmp_path),
        "--save-every",
        "1",
    ]
    process = subprocess.Popen(
        [*command, "--pictures", "4"], env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        wait_until((tmp_path / train_shapes.CHECKPOINT).exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    wait_until(lambda: all(map(ended, children)))


ENDED = """if 1:
    import os, runpy, signal, sys

    class Interrupts:
        def find_spec(self, name, path=None, target=None):
            if name == {module!r}:
                os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.meta_path.insert(0, Interrupts())
    sys.argv[:] = ["tool"]
    sys.path.insert(0, {tools!r})
    runpy.run_path({tools!r} + "/{name}.py", run_name="__main__")"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("convert", "argparse"),
        ("train_shapes", "sentencepiece"),
        ("eval_shapes", "torch._C"),
        ("bench", "torch"),
        ("pope", "minillava.files.text"),
    ],
)
def test_ctrl_c_while_a_tool_is_imported_leaves_no_traceback(name, module):
    """Ctrl-C in the seconds that the imports take would print a traceback."""
    script = ENDED.format(name=name, module=module, tools=str(ROOT / "tools"))
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the workers in /proc")
@pytest.mark.slow
def test_ctrl_c_ends_an_evaluation_and_its_workers():
    """It waited for all questions that were handed out, and the workers printed tracebacks."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "eval_shapes.py"), "--workers", "1"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal sends Ctrl-C to all of a group
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def workers() -> list[str]:
        found = []
        for child in children.read_text().split():
            with suppress(OSError):  # an import may ask a program for a word, which has ended
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(child)
        return found

    try:
        wait_until(workers)
        started = workers()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "\n")
    wait_until(lambda: all(map(ended, started)))


@pytest.mark.parity
def test_a_folder_that_cannot_be_made_is_one_line(train_shapes, tmp_path):
    """It was a traceback, too."""
    (tmp_path / "file").touch()
    script = ROOT / "tools" / "train_shapes.py"
    done = python(script, "--out", tmp_path / "file" / "t")
    assert (done.returncode, done.stdout) == (1, "")
    assert (done.stderr.count("\n"), done.stderr[:7]) == (1, "error: ")


@pytest.mark.parity
def test_muon_is_torchs_in_float32(train_shapes):
    """A few steps of ours and of torch.optim.Muon, which rounds to bfloat16 on the way."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with PyTorch 2.9")
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimisers = (
        train_shapes.Muon(ours, lr=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="original"),
    )
    for _ in range(5):
        for parameters in zip(ours, theirs, strict=True):
            gradient = torch.randn(parameters[0].shape, generator=generator)
            for p in parameters:
                p.grad = gradient.clone()
        for optimiser in optimisers:
            optimiser.step()
    for ours_p, theirs_p, start_p in zip(ours, theirs, start, strict=True):
        assert (ours_p - theirs_p).norm() < 0.02 * (theirs_p - start_p).norm()


# --- the weights ----------------------------------------------------------------------------------

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "config.json").exists(), reason="weights/shapes is not trained yet"
)


@needs_weights
def test_folder_is_small_and_in_the_hubs_layout():
    """The repository would grow by a training state, or the example pictures no longer show their
    scenes."""
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 12e6
    index = json.loads((WEIGHTS / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) == 2
    assert not (WEIGHTS / "training.pt").exists()
    for i, example in enumerate(shapes.EXAMPLES, start=1):
        with Image.open(WEIGHTS / f"example-{i}.png") as picture:
            assert np.array_equal(
                np.asarray(picture), np.asarray(shapes.draw(example, sharpness=4))
            )


@needs_weights
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_examples_are_described_truly(dtype):
    """The first answer that a user sees would describe another picture than the bundled one."""
    assistant = minillava.load(WEIGHTS, device="cpu", dtype=dtype)
    golden = [
        "I see a large red star at the top left, a small blue circle in the center "
        "and a large green square at the bottom right.",
        "I see a small purple ring at the top right and a large orange triangle on the left.",
        "I see a large pink cross at the top, a small black circle on the left, a small yellow "
        "square on the right "
        "and a large green star at the bottom.",
    ]
    for i, (text, example) in enumerate(zip(golden, shapes.EXAMPLES, strict=True), start=1):
        assert text == shapes.describe(example)
        assert assistant.ask(WEIGHTS / f"example-{i}.png") == text


@pytest.mark.slow
@needs_weights
def test_the_model_looks_at_the_picture(bundled):
    """More than nine in ten answers about fresh scenes are true, and few once the pictures are
    swapped."""

    def right(name, count, kinds, picture=None) -> float:
        items = eval_shapes.make_items(name, count, kinds, picture=picture)
        answers = eval_shapes.answer_all(lambda some: eval_shapes.answer(bundled, some), items)
        return sum(right for right, _ in eval_shapes.score(items, answers).values()) / len(items)

    assert right("quick", 12, ("describe", "colour", "where", "yes/no")) > 0.9
    assert right("quick", 12, ("describe",), eval_shapes.noise) < 0.5

    empty = eval_shapes.make_items("quick blank", 5, ("describe",), picture=eval_shapes.blank)
    assert eval_shapes.answer(bundled, empty) == [shapes.EMPTY] * 5


@pytest.mark.parity
@needs_weights
def test_hugging_face_agrees(count: int = 20):
    """The folder as it is, in transformers: the same logits to the bit, and the same greedy
    answers."""
    pytest.importorskip("transformers", minversion="5", reason="live parity needs transformers 5")
    ours = minillava.load(WEIGHTS, device="cpu", dtype="float32", attention="eager")
    theirs = hf.load(WEIGHTS, dtype="float32", attention="eager")
    items = eval_shapes.make_items("parity", count, kinds=("describe",))
    # llava-hf's own processor would crop where minillava pads, so both get the same pixels.
    pixels = ours.image_processor([picture for _, picture in items])
    rows = [ours.tokenizer.encode(ours.prompt(dialogue.turns[-1][0])) for dialogue, _ in items]
    for start in range(0, count, 10):
        some, shown = rows[start : start + 10], pixels[start : start + 10]
        made = generate(ours.model, some, shown, max_new_tokens=80, record=("logits",))
        expected = hf.generate(theirs, some, shown, max_new_tokens=80)
        assert torch.equal(made.sequences, expected.new)
        for step, (a, b) in enumerate(zip(made.logits, expected.logits, strict=True)):
            assert torch.equal(a, b), step
