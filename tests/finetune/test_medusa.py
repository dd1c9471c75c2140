"""Heads of Medusa: what each learns to guess, on a model that stays as it is."""

import json
from functools import partial

import pytest
import torch
from models import stored
from paths import REFERENCE, ROOT
from PIL import Image
from safetensors.torch import load_file

import minillava
from minillava.cli.doors import enter
from minillava.config import IGNORE_INDEX
from minillava.finetune.learning import make_optimiser, prepare
from minillava.finetune.loop import train
from minillava.finetune.medusa import NAME, accuracy, heads_of, read_answers
from minillava.finetune.recipe import Recipe, read_recipe
from minillava.finetune.rows import Example, Row
from minillava.generate.medusa import Medusa

main = partial(enter, "finetune")

PLAIN = REFERENCE / "plain"

SHORT = {"learn": "medusa", "batch": 1, "accumulate": 1, "rate": 3e-2, "order": "file",
         "warmup": 0.0, "heads": 3}  # fmt: skip


def example(ids: list[int], learnt: int) -> Example:
    labels = [IGNORE_INDEX] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    return Example(Row("a", (), (("a", "b"),), None), ids, labels, (), len(ids), cut=False)


def no_pictures(paths: list) -> torch.Tensor:
    assert not paths
    return torch.zeros(0, 3, 56, 56)


def learnt_model(examples: list[Example], **recipe):
    """(the assistant, what it held before, what learns by name) of a run."""
    assistant = stored("plain", attention="eager")
    before = {name: tensor.clone() for name, tensor in assistant.model.state_dict().items()}
    chosen = Recipe(**{**SHORT, **recipe})
    learning = prepare(assistant.model, chosen)
    optimiser = make_optimiser(learning, chosen)
    list(train(assistant.model, examples, no_pictures, chosen, optimiser))  # type: ignore[arg-type]
    return assistant, before, learning


def test_a_head_is_told_the_token_after_the_next():
    """Shifted by one, a head learns what the model's own head says already, and every guess is a
    token late. What follows an answer's end is not guessed."""
    model = stored("plain", attention="eager").model
    prepare(model, Recipe(**SHORT))
    ids = [1, 30, -200, 41, 11, 12, 13, 2]
    pixels = torch.randn(1, 3, *[model.config.vision.image_size] * 2)
    labels = [IGNORE_INDEX] * 4 + ids[4:]
    hidden, targets = read_answers(model, [ids], [labels], pixels)
    none = IGNORE_INDEX
    expected = [[12, 13, 2], [13, 2, none], [2, none, none], [none, none, none]]
    assert targets.tolist() == expected
    spliced = model.splice([ids], pixels)
    states = model.language_model(spliced.embeds).hidden[0]  # [T, C]
    assert torch.equal(hidden, states[-5:-1])  # from the last of the prompt on


def test_a_second_answer_is_not_guessed_from_the_first():
    """Between them stands a question, which the model does not say."""
    model = stored("plain", attention="eager").model
    prepare(model, Recipe(**{**SHORT, "heads": 2}))
    none = IGNORE_INDEX
    ids, labels = [1, 5, 6, 7, 8, 9], [none, 5, 6, none, 8, 9]
    _, targets = read_answers(model, [ids], [labels], no_pictures([]))
    assert targets.tolist() == [[6, none], [none, none], [9, none], [none, none]]


def test_what_repeats_is_learnt_by_every_head_and_the_model_stays():
    """A task whose answer is known: head k guesses what comes k + 2 tokens later, for the drafter
    as in training. The first or the last head got no gradient (an issue of Medusa's own code)."""
    period = [40, 41, 42, 43]
    ids = [1, 9, *period * 4]
    assistant, before, learning = learnt_model([example(ids, 16)], updates=30)
    model = assistant.model
    held = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{NAME}.")}
    assert held.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.items())
    heads = heads_of(model)
    for head in heads:
        assert all(bool(tensor.abs().sum() > 0) for tensor in head.parameters())
    assert set(learning) == {f"{NAME}.{name}" for name, _ in heads.named_parameters()}
    found = accuracy(model, [example(ids, 16)], no_pictures, 1)  # type: ignore[arg-type]
    assert found == [[1.0, 1.0]] * 3
    with torch.no_grad():
        states = model.language_model(torch.tensor([ids])).hidden[0]
    draft = Medusa(heads.state_dict(), None, model.language_model, 1).begin([], None, ())
    for at in range(2, len(ids) - 4):
        draft.accept(ids[at + 1 : at + 2], states[at])
        assert draft.propose(3).as_chain().tokens == ids[at + 2 : at + 5]


def test_the_first_update_moves_every_head():
    """A head that the loss leaves out would keep its start."""
    _, _, learning = learnt_model([example([1, 5, 6, 7, 8, 9, 10, 11], 6)], updates=1)
    assert len(learning) == 6
    assert all(bool(tensor.abs().sum() > 0) for tensor in learning.values())  # it began at zero


def test_accuracy_counts_tokens():
    """The share of rows, or of heads' guesses beyond an answer's end, would look better."""
    rows = [example([1, 5, 6, 7, 8], 3), example([1, 9, 10, 11, 12, 13], 4)]
    assistant, _, _ = learnt_model(rows[:1], updates=2)
    model, language = assistant.model, assistant.model.language_model
    right, asked = [0] * 3, [0] * 3
    with torch.no_grad():
        for row in rows:
            states = language(torch.tensor([row.ids])).hidden[0]
            logits = heads_of(model)(states, language)  # [T, K, V]
            for k in range(3):
                for t in range(len(row.ids) - 2 - k):
                    if row.labels[t + 1] != IGNORE_INDEX:
                        asked[k] += 1
                        right[k] += int(logits[t, k].argmax()) == row.ids[t + 2 + k]
    found = accuracy(model, rows, no_pictures, 2)  # type: ignore[arg-type]
    assert [one for one, _ in found] == pytest.approx(
        [a / b for a, b in zip(right, asked, strict=True)]
    )


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Eight rows about four pictures."""
    rows = []
    for i in range(8):
        Image.new("RGB", (40, 30), (60 * (i % 4), 90, 30)).save(tmp_path / f"{i % 4}.png")
        turns = [("human", "<image>\nWhat?"), ("gpt", "a b c d")]
        listed = [{"from": speaker, "value": text} for speaker, text in turns]
        rows.append({"id": i, "image": f"{i % 4}.png", "conversations": listed})
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "rows.json"


LEARN = ("--learn", "medusa", "--heads", 2, "--batch", 2, "--accumulate", 1, "--device", "cpu")


@pytest.mark.parametrize("quantize", [(), ("--quantize", "int4")])
def test_the_command_makes_heads_that_guess(run_main, data, tmp_path, quantize):
    """The file would have names that no reader knows, or the log would not say how often the heads
    are right."""
    out = tmp_path / "out"
    status, printed, errors = run_main(
        main, PLAIN, data, "--out", out, *LEARN, "--hold-out", 0.4, *quantize
    )
    assert (status, printed) == (0, ""), errors
    assert f"--weights {PLAIN} --draft medusa:{out}" in errors
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    measured = [line["held_out_top_1_and_5"] for line in log if "held_out_top_1_and_5" in line]
    assert len(measured) == 2
    for each in measured:
        assert len(each) == 2
        assert all(0 <= one <= five <= 1 for one, five in each)
    assert errors.count("top-1 and top-5 of head 0: ") == 2
    heads = load_file(out / "medusa_lm_head.safetensors")
    names = {f"{k}.0.linear.{kind}" for k in (0, 1) for kind in ("weight", "bias")}
    assert set(heads) == names
    assert {tensor.dtype for tensor in heads.values()} == {torch.float16}
    assistant = minillava.load(PLAIN, device="cpu")
    picture, asked = data.parent / "1.png", {"max_new_tokens": 12, "min_new_tokens": 12}
    drafts = assistant.drafts(f"medusa:{out}", 2)
    expected = assistant.ask(picture, "What?", **asked)
    assert assistant.ask(picture, "What?", draft=drafts, **asked) == expected
    assert drafts.report.drafted > 0


def test_the_best_heads_are_kept_and_a_run_without_gain_ends(run_main, data, tmp_path):
    """Only how often they are right was measured, and no loss: --early-stop was ignored, and
    OUT/best not written."""
    more = ("--hold-out", 0.4, "--evaluate-every", 1)
    for out, flags in (("a", ("--rate", 3e-2)), ("b", ("--rate", 0, "--early-stop", 2))):
        given = (*LEARN, *more, *flags, "--epochs", 4)
        assert run_main(main, PLAIN, data, "--out", tmp_path / out, *given)[0] == 0
    gains, none = (
        [
            json.loads(line)
            for line in (tmp_path / out / "log.jsonl").read_text("utf-8").splitlines()
        ]
        for out in "ab"
    )
    losses = [record["held_out_loss"] for record in gains if "held_out_loss" in record]
    assert losses[-1] < losses[0]
    best, last = (
        load_file(tmp_path / "a" / f / "medusa_lm_head.safetensors") for f in ("best", "")
    )
    same = all(torch.equal(best[name], last[name]) for name in last)
    assert same is (losses.index(min(losses)) == len(losses) - 1)
    assert max(record["update"] for record in none) == 2
    assert not (tmp_path / "b" / "best").exists()


def test_a_run_of_heads_goes_on(run_main, data, tmp_path):
    """Interrupted, it would end with other heads than a run in one go."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, flags in ((whole, ("--updates", 6)), (parts, ("--updates", 6, "--save-every", 3))):
        assert run_main(main, PLAIN, data, "--out", out, *LEARN, *flags)[0] == 0
    assert run_main(main, PLAIN, data, "--out", parts, *LEARN, "--updates", 6, "--resume")[0] == 0
    a, b = (load_file(out / "medusa_lm_head.safetensors") for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_asked_of_heads_in_vain_is_one_line(run_main, data, tmp_path):
    """--merged would write a model without them."""
    status, _, errors = run_main(main, PLAIN, data, "--out", tmp_path / "o", *LEARN, "--merged")
    assert (status, len(errors.splitlines()) - errors.count("note: ")) == (1, 1)
    assert "--merged is for a LoRA" in errors
    assert not (tmp_path / "o").exists()
    status, _, errors = run_main(main, PLAIN, data, "--out", tmp_path / "o", *LEARN, "--heads", 99)
    assert "heads is 99, expected a number from 1 to 64" in errors
    status, printed, _ = run_main(main, PLAIN, data, "--plan", *LEARN)
    width = stored("plain").model.config.text.hidden_size
    millions = f"{2 * (width * width + width) / 1e6:.1f}"
    assert (status, printed.split(": ")[1].split("\n")[0]) == (0, f"heads {millions} M at 0.001")


def test_heads_learn_in_the_prompts_that_are_asked():
    """LLaVA's training writes another first sentence, after which the model says other things."""
    assert read_recipe("lora", {"learn": "medusa"}).template == "llava_v1"
    assert read_recipe("lora", {}).template == "vicuna_v1"
    assert read_recipe("lora", {"learn": "medusa", "template": "plain"}).template == "plain"


@pytest.mark.slow
def test_the_tool_asks_and_learns(tmp_path):
    """The rows that it makes would not be those that finetune reads."""
    import train_medusa

    learn = ["--epochs", "1", "--batch", "4", "--hold-out", "0.25"]
    assert train_medusa.main(["--out", str(tmp_path), "--scenes", "3", *learn]) == 0
    rows = json.loads((tmp_path / "data" / "rows.json").read_text("utf-8"))
    assert len(rows) == 12
    assistant = minillava.load(ROOT / "weights" / "shapes", device="cpu", dtype="float32")
    question, answer = (turn["value"] for turn in rows[0]["conversations"])
    picture = tmp_path / "data" / rows[0]["image"]
    assert assistant.ask(picture, question.removeprefix("<image>\n")) == answer
    heads = load_file(tmp_path / "heads" / "medusa_lm_head.safetensors")
    assert len({name.split(".")[0] for name in heads}) == 4
