"""`python -m minillava.finetune`: checked, learnt, saved as others open it, and gone on with."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import python
from paths import REFERENCE
from PIL import Image
from safetensors.torch import load_file

import minillava
from minillava.cli.doors import enter
from minillava.finetune import flags, recipe, save
from minillava.finetune import run as finetune_run
from minillava.finetune.run import finetune

main = partial(enter, "finetune")

PLAIN = REFERENCE / "plain"

QUICK = ("--rank", "4", "--batch", "1", "--accumulate", "2", "--rate", "1e-2", "--device", "cpu",
         "--projector-rate", "1e-3")  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    """Six rows, one of text alone, with two pictures."""
    for i in range(2):
        Image.new("RGB", (40, 30), (200 * i, 90, 30)).save(tmp_path / f"{i}.png")
    rows = [
        {
            "id": i,
            "image": f"{i % 2}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"a {'bcd'[i % 3]} " * (i % 3 + 1)},
            ],
        }
        for i in range(5)
    ]
    hello = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows.append({"id": 5, "conversations": hello})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def learn(run_main, data: Path, out: Path, *more: object, model: Path = PLAIN) -> str:
    status, printed, errors = run_main(main, model, data, "--out", out, *QUICK, *more)
    assert (status, printed) == (0, ""), errors
    return errors


def logits(folder: Path, **options) -> torch.Tensor:
    model = minillava.load(
        folder, device="cpu", dtype="float32", attention="eager", **options
    ).model
    pixels = torch.randn(1, 3, *[model.config.vision.image_size] * 2, generator=fixed())
    with torch.no_grad():
        return model([[1, 5, -200, 9, 30]], pixels).logits


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rows_are_shown_and_nothing_is_written(run_main, data, tmp_path, monkeypatch):
    """--check would begin to learn, or write into the user's folder, or cut all rows into tokens to
    show two."""
    before, cut = sorted(tmp_path.iterdir()), []
    encode = finetune_run._encode
    monkeypatch.setattr(finetune_run, "_encode", lambda *row: cut.append(row) or encode(*row))
    status, printed, errors = run_main(main, PLAIN, data, "--check", 2)
    assert status == 0 and len(cut) == 2
    assert printed.count("ends with </s>") == 2 and "[[" in printed
    assert "6 rows (5 with a picture, 1 of text alone), 6 answers" in errors
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_row_ends_a_run_before_a_model_is_opened(run_main, data, tmp_path):
    """A missing picture would end the run hours in, or be left out unasked."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    rows[2]["image"] = "gone.png"
    data.write_text(json.dumps(rows), encoding="utf-8")
    status, _, errors = run_main(main, PLAIN, data, "--out", tmp_path / "out")
    assert status == 1
    assert "row '2' (2) names a picture that is not there" in errors
    assert not (tmp_path / "out").exists()
    status, printed, errors = run_main(main, PLAIN, data, "--skip-bad", "--check", 9)
    assert (status, printed.count("row '")) == (0, 5)
    assert "1 row(s) left out" in errors


def test_rows_without_their_picture_are_left_out_where_asked(run_main, data, tmp_path):
    """A file of which a few pictures could not be downloaded would not be learnt at all, or
    everything else that is wrong with it would be left out with them."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    rows[2]["image"] = "gone.png"
    data.write_text(json.dumps(rows), encoding="utf-8")
    skip = ("--missing-images", "skip")
    status, printed, errors = run_main(main, PLAIN, data, *skip, "--check", 9)
    assert (status, printed.count("row '")) == (0, 5)
    assert "1 rows left out whose picture is not there" in errors
    rows[0]["conversations"][1]["value"] = ""
    data.write_text(json.dumps(rows), encoding="utf-8")
    status, _, errors = run_main(main, PLAIN, data, *skip, "--check", 9)
    assert status == 1 and "row '0' (0) has an empty answer" in errors
    status, _, errors = run_main(main, PLAIN, data, "--check", 9, "--verbose")
    assert f"names a picture that is not there (first: {tmp_path / 'gone.png'})" in errors
    data.write_text(json.dumps(rows[2:3]), encoding="utf-8")
    status, _, errors = run_main(main, PLAIN, data, *skip, "--check", 9)
    assert status == 1 and "has no row whose picture is in" in errors


def test_rows_of_several_files_are_learnt_by_their_weights(run_main, data, tmp_path):
    """A small file would drown in a large one, or held-out rows be learnt by another file's
    weight. Each file's pictures lie beside it."""
    other = tmp_path / "other"
    other.mkdir()
    rows = json.loads(data.read_text(encoding="utf-8"))
    (other / "0.png").write_bytes((tmp_path / "0.png").read_bytes())
    (other / "more.json").write_text(json.dumps(rows[:1]), encoding="utf-8")
    out = tmp_path / "out"
    more = f"{other / 'more.json'}:3"
    status, _, told = run_main(main, PLAIN, data, more, "--out", out, *QUICK)
    assert status == 0, told
    assert "9 rows an epoch, by the weights of the files" in told
    log = [json.loads(s) for s in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert sum(record["rows"] for record in log) == 9
    half = run_main(main, PLAIN, f"{data}:0.5", "--plan", *QUICK)[1]
    assert "rows     3, 2 update(s) of 2 rows" in half
    status, printed, _ = run_main(main, PLAIN, data, other / "more.json", "--check", 9)
    assert status == 0 and "row '0' (0) of more.json: " in printed
    status, _, errors = run_main(main, PLAIN, f"{data}:0.01", "--plan", *QUICK)
    assert status == 1 and "the weights of the files leave none of 6 row(s)" in errors
    status, _, errors = run_main(main, PLAIN, f"{data}:0", "--plan")
    assert status == 2 and "its weight is 0, expected a number above 0" in errors


def test_the_plan_says_what_learns_and_writes_nothing(run_main, data, tmp_path):
    """--plan would count other weights than those that learn."""
    status, printed, _ = run_main(main, PLAIN, data, "--plan", *QUICK)
    assert status == 0
    model = minillava.load(PLAIN, device="cpu").model
    adapted = sum(
        4 * (module.in_features + module.out_features)
        for module in model.language_model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    )
    learnt = adapted + sum(p.numel() for p in model.projector.parameters())
    assert printed.startswith(f"learn    {learnt / 1e6:.1f} M of ")
    assert "rows     6, 3 update(s) of 2 rows" in printed
    assert not (tmp_path / "out").exists()


def test_a_lora_is_opened_by_minillava_and_changes_its_answers(run_main, data, tmp_path):
    """The saved adapter would not be found by load, or change nothing."""
    told = learn(run_main, data, tmp_path / "out", "--epochs", 2)
    assert f"--weights {PLAIN} --adapter {tmp_path / 'out'}" in told
    assert not torch.equal(logits(PLAIN), logits(PLAIN, adapter=tmp_path / "out"))
    log = [
        json.loads(line)
        for line in (tmp_path / "out" / "log.jsonl").read_text("utf-8").splitlines()
    ]
    assert [record["update"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["rates"] == {"LoRA": 0.0, "projector": 0.0}
    assert sum(record["rows"] for record in log) == 12


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_peft_opens_a_lora_and_computes_the_same(run_main, data, tmp_path):
    """PEFT would skip tensors under names it does not know, and answer as the base."""
    hf = pytest.importorskip("hf")
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    learn(run_main, data, tmp_path / "out")
    base = hf.load(PLAIN)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    named = dict(model.named_parameters())
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        theirs = name.replace(".weight", ".default.weight") if ".lora_" in name else name
        theirs = theirs.replace(
            "multi_modal_projector.", "multi_modal_projector.modules_to_save.default."
        )
        assert torch.equal(named[theirs], tensor), name
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == sum(".lora_" in n or ".modules_to_save." in n for n in named)
    merged = model.merge_and_unload()
    pixels = torch.randn(1, 3, *[base.config.vision_config.image_size] * 2, generator=fixed())
    found = hf.forward(merged, [[1, 5, -200, 9, 30]], pixels)["logits"]
    assert torch.equal(found, logits(PLAIN, adapter=tmp_path / "out"))


@pytest.mark.parametrize("learnt", ["lora", "projector"])
def test_what_learns_on_quantised_weights_is_saved_alike(run_main, data, tmp_path, learnt):
    """What was learnt on int8 weights could not be opened on the whole ones."""
    learn(run_main, data, tmp_path / "out", "--quantize", "int8", "--learn", learnt)
    where = {"adapter": tmp_path / "out"} if learnt == "lora" else {}
    folder = PLAIN if learnt == "lora" else tmp_path / "out"
    where |= {} if learnt == "lora" else {"model_base": PLAIN}
    assert not torch.equal(logits(folder, **where), logits(PLAIN))


def test_both_layouts_hold_the_same_model(run_main, data, tmp_path):
    """One layout would leave out the projector, or merge the adapter otherwise."""
    for layout in ("hf", "llava"):
        learn(run_main, data, tmp_path / layout, "--layout", layout, "--merged")
    assert {path.name for path in (tmp_path / "llava").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "curve.png", "log.jsonl",
        "model", "non_lora_trainables.bin", "preprocessor_config.json", "recipe.json", "state.pt",
        "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    expected = logits(PLAIN, adapter=tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "llava", model_base=PLAIN), expected)
    for layout in ("hf", "llava"):
        assert torch.equal(logits(tmp_path / layout / "model"), expected)


def test_llava_finds_a_lora_under_its_own_names(run_main, data, tmp_path):
    """LLaVA's loader renames by hand (builder.py): what it does not find stays as in the base."""
    learn(run_main, data, tmp_path / "out", "--layout", "llava")
    rest = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    # as there: without base_model., then without the first of two model.
    renamed = {name.removeprefix("base_model.").removeprefix("model.") for name in rest}
    assert renamed == {
        f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert layer in stored and len(stored) == 2 * 7 * 2
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (config["mm_projector_type"], config["mm_use_im_start_end"]) == ("mlp2x_gelu", False)
    assert config["mm_vision_tower"]


@pytest.mark.parametrize("more", [("--layout", "hf"), ("--layout", "llava"), ("--learn", "projector")])  # fmt: skip
def test_what_was_learnt_is_opened_by_its_folder_alone(run_main, data, tmp_path, more):
    """The base had to be named again each time, though its name stands in the files."""
    out = tmp_path / "out"
    learn(run_main, data, out, *more)
    given = {"adapter": out} if "hf" in more else {"model_base": PLAIN}
    assert torch.equal(logits(out), logits(PLAIN if "hf" in more else out, **given))
    moved = json.loads((out / "recipe.json").read_text("utf-8"))
    assert (moved["rank"], moved["quantize"]) == (4, None)
    named = [out / name for name in ("adapter_config.json", "config.json") if (out / name).exists()]
    assert all(str(PLAIN) in path.read_text("utf-8") for path in named) and named
    for path in named:
        gone = path.read_text("utf-8").replace(str(PLAIN), str(tmp_path / "gone"))
        path.write_text(gone, "utf-8")
    with pytest.raises(FileNotFoundError, match="--model-base"):
        minillava.load(out)


@pytest.mark.parity
def test_transformers_opens_a_whole_model_and_computes_the_same(run_main, data, tmp_path):
    """A tensor under a name it does not know would start at random, with a warning at most."""
    hf = pytest.importorskip("hf")
    pytest.importorskip("transformers")
    learn(run_main, data, tmp_path / "out", "--learn", "language")
    model = hf.load(tmp_path / "out" / "model")  # ValueError if anything is missing or unexpected
    pixels = torch.randn(1, 3, *[model.config.vision_config.image_size] * 2, generator=fixed())
    found = hf.forward(model, [[1, 5, -200, 9, 30]], pixels)["logits"]
    assert torch.equal(found, logits(tmp_path / "out" / "model"))


def test_a_projector_is_saved_as_llava_saves_it(run_main, data, tmp_path):
    """LLaVA would not find the projector under its names."""
    told = learn(run_main, data, tmp_path / "out", "--learn", "projector")
    assert f"--weights {tmp_path / 'out'} --model-base {PLAIN}" in told
    found = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert sorted(found) == [
        f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("bias", "weight")
    ]
    assert not torch.equal(logits(tmp_path / "out", model_base=PLAIN), logits(PLAIN))


def test_a_whole_model_is_written_like_the_one_it_began_from(run_main, data, tmp_path):
    """The written model would lack tensors, have another dtype, or a tower that moved."""
    learn(run_main, data, tmp_path / "out", "--learn", "language")
    before, after = (
        load_file(f / "model.safetensors") for f in (PLAIN, tmp_path / "out" / "model")
    )
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("vision_tower.") for name in moved)
    assert not torch.equal(logits(tmp_path / "out" / "model"), logits(PLAIN))


@pytest.mark.parametrize("learnt", ["lora", "language"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(run_main, data, tmp_path, monkeypatch, learnt):
    """AdamW started afresh, and rows in another order, are what others call to resume."""
    more = ("--learn", learnt, "--epochs", 2, "--save-every", 1)
    learn(run_main, data, tmp_path / "whole", *more)
    out = tmp_path / "parts"
    real, done = save_state_of(), []

    def die(*arguments) -> None:
        real(*arguments)
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minillava.finetune.session.save_state", die)
        status, _, _ = run_main(main, PLAIN, data, "--out", out, *QUICK, *more)
    assert status == 130
    told = learn(run_main, data, out, *more, "--resume")
    assert "goes on after update 3" in told
    whole, parts = (
        torch.load(f / "state.pt", weights_only=True) for f in (tmp_path / "whole", out)
    )
    assert whole["update"] == parts["update"] == 6
    for name, tensor in whole["learnt"].items():
        assert torch.equal(tensor, parts["learnt"][name]), name
    records = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
        for folder in (tmp_path / "whole", out)
    ]
    measured = dict.fromkeys(("seconds", "tokens_per_second", "peak_memory"))
    for a, b in zip(*records, strict=True):
        assert {**a, **measured} == {**b, **measured}


def test_a_run_that_ended_before_its_files_were_written_writes_them(
    run_main, data, tmp_path, monkeypatch
):
    """A run stopped after its last update could not be saved any more."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("minillava.finetune.session.save_learnt", interrupted)
        status, _, _ = run_main(main, PLAIN, data, "--out", out, *QUICK)
    assert (status, {path.name for path in out.iterdir()}) == (
        130, {"log.jsonl", "recipe.json", "state.pt"},
    )  # fmt: skip
    learn(run_main, data, out, "--resume")
    assert not torch.equal(logits(PLAIN), logits(PLAIN, adapter=out))
    assert len((out / "log.jsonl").read_text("utf-8").splitlines()) == 3


def interrupted(*arguments) -> None:
    raise KeyboardInterrupt


def save_state_of():
    from minillava.finetune.state import save_state

    return save_state


def test_a_run_goes_on_with_what_it_was_only(run_main, data, tmp_path):
    """--resume would mix two runs with other rows or settings."""
    out = tmp_path / "out"
    assert "starts anew" in learn(run_main, data, out, "--resume")
    for more, told in ((("--seed", 1), "seed was 42, and is 1 now"), ((), "data was ")):
        if not more:
            data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        status, _, errors = run_main(main, PLAIN, data, "--out", out, *QUICK, "--resume", *more)
        assert (status, errors.count("error: ")) == (1, 1)
        assert told in errors
    (out / "state.pt").write_bytes(b"PK\3\4 damaged")
    status, _, errors = run_main(main, PLAIN, data, "--out", out, *QUICK, "--resume")
    assert status == 1 and "cannot be read" in errors


def test_nothing_of_the_users_is_overwritten(run_main, data, tmp_path):
    """A run would write into a folder that holds the user's files."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for out, more in ((tmp_path / "out", ()), (tmp_path / "out", ("--resume",)), (data, ())):
        status, _, errors = run_main(main, PLAIN, data, "--out", out, *QUICK, *more)
        assert status == 1, out
        assert "name a" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.slow
def test_ctrl_c_saves_the_update_that_is_being_made(data, tmp_path):
    """A signal in the middle of AdamW's step would leave half of it."""
    script = (
        "import sys\nfrom minillava.cli.doors import begin\nimport minillava.finetune.loop as loop\n"
        "import os, signal\nreal = loop._clip\n"
        "def clip(*a):\n    os.kill(os.getpid(), signal.SIGINT)\n    return real(*a)\n"
        "loop._clip = clip\nbegin('finetune', sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    arguments = [str(PLAIN), str(data), "--out", str(out), *QUICK]
    done = python("-c", script, *arguments)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert torch.load(out / "state.pt", weights_only=True)["update"] == 1


def test_a_model_in_several_folders_is_written_as_one(run_main, data, tmp_path, write_dialect):
    """Stage 2 as published begins from a language model, a projector and a CLIP: it would learn for
    hours, and end in a folder that lacks the tower."""
    found = write_dialect("original-bare", tmp_path / "bare")
    learn(
        run_main, data, tmp_path / "out", "--vision-tower", found["vision_tower"], "--learn",
        "language", model=found["weights"],
    )  # fmt: skip
    whole = minillava.load(tmp_path / "out" / "model", device="cpu", dtype="float32").model
    before = minillava.load(PLAIN, device="cpu", dtype="float32").model.state_dict()
    learnt = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["learnt"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, learnt[name] if name in learnt else before[name]), name


@pytest.mark.parametrize(
    ("wrong", "status", "told"),
    [
        (("--template", "hf"), 1, "never learn to stop"),
        (("--template", "plain"), 1, "no caption of one picture"),
        (("--rank", "0"), 1, "rank is 0"),
        (("--max-length", "5"), 1, "no answer is left"),
        (("--check", "0"), 2, "--check is 0"),
        (("--save-every", "0"), 2, "--save-every is 0"),
        (("--learn", "tower"), 2, "invalid choice"),
        (("--quantize", "int8", "--learn", "language"), 1, "quantised weights cannot learn"),
        (("--dtype", "float16"), 1, "float16 overflows at 65,504"),
        (("--early-stop", "2"), 2, "--early-stop needs rows"),
        (("--val", "x.json", "--hold-out", "0.5"), 2, "two ways to choose rows"),
        (("--quantize", "int8", "--merged"), 1, "leave --merged or --quantize out"),
    ],
)
def test_wrong_settings_are_told_in_one_line(run_main, data, tmp_path, wrong, status, told):
    """A setting that cannot learn would be noticed after hours, or never."""
    found, _, errors = run_main(main, PLAIN, data, "--out", tmp_path / "out", *wrong)
    assert (found, told in errors) == (status, True), errors
    assert not (tmp_path / "out").exists()


def test_flags_without_a_place_for_what_is_learnt_are_refused(run_main, data):
    """A run without --out would learn for hours and keep nothing."""
    status, _, errors = run_main(main, PLAIN, data)
    assert status == 2 and "--out" in errors


def test_the_layouts_that_flags_offer_are_those_that_are_written():
    """The flags are read before torch is imported, and so do not read save.py."""
    run = {names[0]: settings for names, settings in flags.FLAGS}
    assert run["--layout"]["choices"] == save.LAYOUTS


def test_it_learns_in_python(data, tmp_path):
    """A mistyped option in Python would be ignored, and its default be learnt with."""
    finetune(PLAIN, data, tmp_path / "out", rank=4, batch=2, accumulate=1, updates=2, device="cpu")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    with pytest.raises(TypeError, match="there is no option 'ranks'"):
        finetune(PLAIN, data, tmp_path / "x", ranks=4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"save_every": 0}, "--save-every is 0, expected 1 or more"),
        ({"early_stop": 3}, "--early-stop needs rows that are measured"),
        ({"checkpoint": True}, "--checkpoint"),
        ({"layout": "peft"}, "--layout: invalid choice: 'peft'"),
        ({"learn": "tower"}, "--learn: invalid choice: 'tower'"),
    ],
)
def test_python_refuses_what_the_command_refuses(data, tmp_path, options, told):
    """In Python they were not checked: a division by zero came after the first update, and the rest
    was ignored without a word."""
    with pytest.raises(ValueError, match=told):
        finetune(PLAIN, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_of_python_are_read_as_the_flags():
    """A default, or a name that differs from its flag, would mean another run in Python."""
    parser = flags.make_parser()
    assert {field.name for field in dataclasses.fields(recipe.Recipe)} <= set(parser.spelled)
    line = "m d --out o --image-aspect-ratio crop --rate 2e-05 --merged --log wandb -q"
    (expected,) = flags.read_flags(parser, line.split())
    options = {"out": Path("o"), "aspect": "crop", "rate": 2e-5, "merged": True, "log": ["wandb"],
               "resume": False, "val": None, "quiet": True}  # fmt: skip
    assert flags.read_options("m", Path("d"), options) == expected


def test_held_out_rows_are_measured_and_not_learnt(run_main, data, tmp_path):
    """Without them a run that learns its rows by heart looks as good as any."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    told = learn(run_main, data, tmp_path / "out", "--hold-out", 0.3, "--epochs", 3)
    log = [json.loads(s) for s in (tmp_path / "out" / "log.jsonl").read_text("utf-8").splitlines()]
    held = [record for record in log if "held_out_loss" in record]
    learnt = sum(record["rows"] for record in log if "rows" in record)
    assert [record["update"] for record in held] == [0, log[-1]["update"]]
    assert held[0]["held_out_loss"] != held[1]["held_out_loss"]
    assert f"on {len(rows) - learnt // 3} held-out row(s)" in told
    assert 0 < learnt // 3 < len(rows)
    status, _, errors = run_main(main, PLAIN, data, "--out", tmp_path / "x", "--hold-out", 1e-9)
    assert (status, "to measure; give another share" in errors) == (1, True)


def test_a_picture_is_on_one_side_and_stays_there(data):
    """A held-out row whose picture is learnt too would make the run look better than it is."""
    from minillava.finetune.rows import hold_out, read_rows

    rows = read_rows(data).rows
    learnt, held = hold_out(rows, 0.5)
    assert len(learnt) + len(held) == len(rows)
    assert not {row.pictures for row in learnt if row.pictures} & {row.pictures for row in held}
    assert hold_out(rows[:3], 0.5)[1] == [row for row in held if row in rows[:3]]
    assert hold_out(rows, 0.0) == (rows, [])
