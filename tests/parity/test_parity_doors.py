"""Every relative of LLaVA-1.5 through every door: each answers as it does alone, as transformers
does, or is refused in one line."""

import base64
import functools
import json
from functools import partial

import hf
import pytest
import torch
from commands import status_of
from kinds import KINDS, ORIGINAL, write_kind
from tiled import draw

import minillava
from minillava.chat import Conversation
from minillava.cli.doors import enter
from minillava.fast.row_by_row import keep_bits
from minillava.generate.contrast import METHODS
from minillava.generate.generation import generate
from minillava.inspection.report import inspect_folder
from minillava.look.run import look
from minillava.prompt import place_images, render

pytest.importorskip("transformers", minversion="5", reason="the models are saved by transformers 5")

pytestmark = [pytest.mark.numeric, pytest.mark.parity]

load = functools.partial(minillava.load, device="cpu", dtype="float32")
QUESTIONS = ["What is it?", "Which colour is this star?", "Why?", "Compare the two.", "Hello"]
DOORS = ("--device", "cpu", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of different shapes, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{name}.png" for name in "abc"]
    for path, size in zip(paths, ((30, 50), (112, 112), (170, 60)), strict=True):
        draw(*size).save(path)
    return paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(kind)`: a folder of it, written once."""
    return functools.cache(lambda kind: write_kind(kind, tmp_path_factory.mktemp(kind)))


def asked(pictures):
    """For each question its pictures: none, one, or two."""
    return [*pictures, [pictures[0], pictures[2]], None]


def command(door: str, *arguments: object) -> int:
    return status_of(partial(enter, door), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_drafts_and_contrast_say_what_a_question_says_alone(made, pictures, kind):
    """A batch, a draft or the rows of two pictures would change what a question is answered."""
    assistant, shown = load(made(kind)), asked(pictures)
    ask = partial(assistant.ask, max_new_tokens=6)
    alone = [ask(*pair) for pair in zip(shown, QUESTIONS, strict=True)]
    assert ask(shown, QUESTIONS) == alone
    beams = [ask(*pair, num_beams=3) for pair in zip(shown, QUESTIONS, strict=True)]
    assert ask(shown, QUESTIONS, num_beams=3) == beams
    for draft in ("lookup", str(made(kind))):
        drawn = partial(ask, temperature=1.0, seed=3)
        for pair, expected in zip(zip(shown, QUESTIONS, strict=True), alone, strict=True):
            assert ask(*pair, draft=draft) == expected
            assert drawn(*pair, draft=draft) == drawn(*pair)
    for method in METHODS:
        each = [
            ask(*pair, contrast=method, seed=i)
            for i, pair in enumerate(zip(shown[:4], QUESTIONS, strict=False))
        ]
        assert ask(shown[:4], QUESTIONS[:4], contrast=method, seed=[0, 1, 2, 3]) == each


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_are_the_same(made, pictures, kind, dtype):
    """--same-bits promises the bits of a row alone."""
    assistant, shown = load(made(kind), dtype=dtype), asked(pictures)
    keep_bits(assistant.model)
    record = {"max_new_tokens": 4, "record": ("logits",)}
    ids = [
        assistant.tokenizer.encode(
            assistant.prompt(q, images=len(p) if isinstance(p, list) else int(p is not None))
        )
        for p, q in zip(shown, QUESTIONS, strict=True)
    ]
    flat = [assistant.encode(each) for each in (*pictures, pictures[0], pictures[2])]
    together = generate(assistant.model, ids[:4], flat, **record)
    taken = 0
    for i, row in enumerate(ids[:4]):
        own = flat[taken : taken + row.count(-200)]
        taken += len(own)
        one = generate(assistant.model, [row], own, **record)
        length = one.sequences.shape[1]
        assert torch.equal(together.sequences[i, :length], one.sequences[0])
        for step, whole in zip(one.logits, together.logits, strict=False):
            assert torch.equal(step[0], whole[i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_is_its_whole_prompt(made, pictures, kind):
    """What stays in the cache from turn to turn, pictures of other lengths among it, would stand at
    other places than in a prompt that is read at once."""
    assistant = load(made(kind), dtype="float64", attention="eager")
    template, chat = assistant.template, Conversation(assistant)
    turns: list[tuple[str, str | None]] = []
    for question, new in (("Compare.", [0, 2]), ("Why?", []), ("And this?", [1])):
        for i in new:
            chat.add_image(pictures[i])
        answer = chat.ask(question, max_new_tokens=5)
        turns.append((place_images(question, len(new), template.one_line), None))
        ids = assistant.tokenizer.encode(render(template, turns))
        shown = [pictures[i] for i in (0, 2, 1)][: ids.count(-200)]
        pixels = assistant.image_processor(shown)
        found = generate(
            assistant.model, [ids], pixels, max_new_tokens=5, tokenizer=assistant.tokenizer,
            stop=template.stop,
        )  # fmt: skip
        assert found.text[0].strip() == answer.strip()
        turns[-1] = (turns[-1][0], chat.turns[-1].answer)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("tiles")])
def test_maps_are_the_attention_of_transformers(made, pictures, kind):
    """The map of a word would be that of another position, or of other patches."""
    assistant, model = load(made(kind), attention="eager"), hf.load(made(kind))
    found = look(assistant, pictures[2], "What?", max_new_tokens=4, layers=[1])
    ids = assistant.tokenizer.encode(assistant.prompt("What?"))
    said = [i for word in found.words for i in word.token_ids]
    pixels = assistant.image_processor([pictures[2]])
    given = hf.inputs(model, [[*ids, *said]])
    with torch.no_grad():
        out = model(**given, pixel_values=pixels, use_cache=False, output_attentions=True)
    at, count = ids.index(-200), hf.patches(model)
    prompt = len(ids) - 1 + count
    rows = out.attentions[1][0].mean(0)[prompt - 1 :, at : at + count]
    taken = 0
    for word in found.words:
        own = rows[taken : taken + len(word.token_ids)]
        taken += len(own)
        spoken = torch.from_numpy(word.heat).flatten()
        assert any(torch.allclose(spoken, mean, atol=1e-6) for mean in (own.mean(0), *own)), (
            word.text
        )


def test_layouts_of_the_authors_are_the_same_model(made, pictures, tmp_path):
    """lmms-lab's own folders would be opened with another layer of the tower, tiles that the model
    was not shown, no biases, or Vicuna's template."""
    for kind in ORIGINAL:
        hub = load(made(kind), attention="eager")
        original = load(write_kind(kind, tmp_path / kind, original=True), attention="eager")
        assert hub.template == original.template
        assert hub.model.config.eos_token_ids == original.model.config.eos_token_ids
        shown = [pictures[1], pictures[2]]
        logits = []
        for each in (hub, original):
            ids = each.tokenizer.encode(each.prompt("What?", images=2))
            logits.append(each.model([ids], each.image_processor(shown)).logits)
        rows = min(each.shape[-1] for each in logits)
        assert torch.equal(*(each[..., :rows] for each in logits)), kind
        again = tmp_path / f"{kind}-again"
        with_bytes = kind in ("interleave", "tiles-llama3")  # no tokenizer.model to write
        assert command("convert", tmp_path / kind, again, "--to", "hf") == int(with_bytes)
        if with_bytes:
            continue
        hf.load(again)  # raises where transformers misses something
        ids = original.tokenizer.encode(original.prompt("What?", images=2))
        third = load(again, attention="eager")
        found = third.model([ids], third.image_processor(shown)).logits
        assert torch.equal(found[..., :rows], logits[1][..., :rows])


def rows_of(folder, pictures):
    said = [
        {"id": str(i), "image": pictures[i % 3].name, "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": f"a {'bcd'[i % 3]}"},
            {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "star"}]}
        for i in range(5)
    ]  # fmt: skip
    path = folder / "rows.json"
    path.write_text(json.dumps(said), encoding="utf-8")
    return path


LEARN = ("--device", "cpu", "--batch", "2", "--accumulate", "1", "--epochs", "4", "--rate", "1e-2")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("tiles")])
def test_what_is_learnt_is_what_peft_and_transformers_open(made, pictures, tmp_path, kind):
    """A relative would learn in Vicuna's words or with padded pictures, or its LoRA be for other
    layers than PEFT's."""
    peft = pytest.importorskip("peft", reason="the adapter is opened with peft, too")
    base, rows = made(kind), rows_of(tmp_path, pictures)
    data, lora = (rows, "--images", pictures[0].parent), tmp_path / "lora"
    assert command("finetune", base, *data, "--out", lora, "--rank", "4", *LEARN) == 0
    log = [json.loads(line) for line in (lora / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "loss" in record]
    assert sum(losses[-2:]) < sum(losses[:2])
    ours, model = load(base, attention="eager", adapter=lora), hf.load(base)
    assert hf.read_json(lora / "recipe.json")["aspect"] == (
        "squash" if kind == "interleave" else "pad"
    )
    ids = ours.tokenizer.encode(ours.prompt("What?"))
    pixels, given = ours.image_processor([pictures[0]]), hf.inputs(model, [ids])
    with torch.no_grad():
        before = model(**given, pixel_values=pixels).logits
        theirs = peft.PeftModel.from_pretrained(model, str(lora)).eval()
        expected = theirs(**given, pixel_values=pixels).logits
    found = ours.model([ids], pixels).logits
    assert (found - expected).abs().max() < 1e-4 < (before - expected).abs().max()
    merged, whole = tmp_path / "merged", tmp_path / "whole"
    assert command("convert", base, merged, "--to", "hf", "--adapter", lora) == 0
    learn = ("finetune", base, *data, "--out", whole, "--learn", "language", *LEARN)
    assert command(*learn) == 0
    for folder in (merged, whole / "model"):
        opened, theirs = load(folder, attention="eager"), hf.load(folder)
        assert opened.template == ours.template
        with torch.no_grad():
            expected = theirs(**given, pixel_values=pixels).logits
        assert torch.equal(opened.model([ids], pixels).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_door_opens_it_or_says_why_not_in_one_line(made, pictures, tmp_path, kind, capsys):
    """A door would end in a traceback, or leave half a file."""
    folder, tiles = made(kind), kind.startswith("tiles")
    with_bytes = kind in ("interleave", "llama3", "tiles-llama3")
    model, one = ("-m", folder), ("-i", pictures[2], "-p", "What?", *DOORS)
    rows = rows_of(tmp_path, pictures)
    learn = (folder, rows, "--images", pictures[0].parent, *LEARN[:-4], "--updates", "1")
    no_projector = tiles or kind in ("interleave", "vip")
    cells = [
        (False, "generate", *model, *one, "--quantize", "int4"),
        (False, "generate", *model, *one, "--num-return-sequences", "2", "--temperature", "1"),
        (False, "look", *model, *one, "--html", tmp_path / "look.html"),
        (False, "look", *model, *one, "--lens", tmp_path / "lens.html"),
        (False, "trace", *model, *one, "--html", tmp_path / "trace.html"),
        (tiles, "probe", *model, *one, "--html", tmp_path / "probe.html"),
        (False, "inspect", folder, "--doctor", "--device", "cpu"),
        (False, "convert", folder, tmp_path / "hf", "--to", "hf"),
        (False, "convert", folder, tmp_path / "int8", "--to", "hf", "--quantize", "int8"),
        (with_bytes or kind == "vip", "convert", folder, tmp_path / "o", "--to", "original"),
        (no_projector, "finetune", *learn, "--learn", "projector", "--out", tmp_path / "p"),
        (tiles, "finetune", *learn, "--learn", "medusa", "--out", tmp_path / "heads"),
    ]
    for refused, door, *arguments in cells:
        capsys.readouterr()
        status, told = command(door, *arguments), capsys.readouterr().err
        assert status == int(refused), (door, told)
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(errors) == int(refused) and "Traceback" not in told, told
    if not tiles:
        heads = f"medusa:{tmp_path / 'heads'}"
        assistant = load(folder)
        assert assistant.ask(pictures[0], "What?", max_new_tokens=6, draft=heads) == assistant.ask(
            pictures[0], "What?", max_new_tokens=6
        )
    for kept in ("hf", "int8"):
        quantize = "int8" if kept == "int8" else None
        answers = [
            each.ask(pictures[2], "What?", max_new_tokens=5)
            for each in (load(tmp_path / kept), load(folder, quantize=quantize))
        ]
        assert answers[0] == answers[1]
    assert inspect_folder(folder).loadable


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_answers_as_the_command_line_does(made, pictures, kind):
    """Several pictures, a stream, contrast or maps would be laid out in another way over HTTP."""
    served = pytest.importorskip("served", reason="the extra [serve] is not installed")
    assistant, running = load(made(kind)), served.Running(load(made(kind)))
    try:
        question = "What is it?"
        for shown in (pictures[:1], pictures):
            parts = [part_of(path) for path in shown] + [served.text(question)]
            expected = assistant.ask(shown, question, max_new_tokens=5)
            assert served.said(running.ask(parts, max_tokens=5)) == expected
            events = [json.loads(event) for event in running.events(parts, max_tokens=5)[:-1]]
            pieces = [
                choice["delta"].get("content") or "" for e in events for choice in e["choices"]
            ]
            assert "".join(pieces) == expected
            for method in METHODS:
                answer = running.ask(parts, max_tokens=5, contrast={"method": method}, seed=4)
                expected = assistant.ask(shown, question, max_new_tokens=5, contrast=method, seed=4)
                assert served.said(answer) == expected
        parts = [part_of(pictures[2]), served.text(question)]
        (choice,) = running.ask(parts, max_tokens=5, look=True)["choices"]
        words = look(assistant, pictures[2], question, max_new_tokens=5).words
        for seen, ours in zip(choice["look"]["words"], words, strict=True):
            heat = torch.frombuffer(bytearray(base64.b64decode(seen["map"])), dtype=torch.float32)
            torch.testing.assert_close(
                heat, torch.from_numpy(ours.heat).flatten().float(), rtol=1e-4, atol=1e-6
            )
    finally:
        running.close()


def part_of(path) -> dict:
    content = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
