"""Tokens that a run adds: their rows learn, and everybody who opens the files has them."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from paths import REFERENCE
from PIL import Image

import minillava
from minillava.checkpoint.folders import Folders
from minillava.cli.doors import enter
from minillava.finetune.learning import prepare
from minillava.finetune.recipe import Recipe
from minillava.finetune.tokens import add_rows, new_ids

main = partial(enter, "finetune")

PLAIN = REFERENCE / "plain"
FIRST, OLD = 442, 448  # the id after <pad>; rows of the table, of which the last have no token
NEW = ["<gizmo>", "wibblewobble", "[A1]", "[A2]", "[A3]", "[A4]", "[A5]", "[A6]"]  # two too many
IDS = {text: FIRST + i for i, text in enumerate(NEW)}
QUICK = ("--rank", "4", "--batch", "2", "--accumulate", "1", "--rate", "1e-2", "--device", "cpu",
         "--epochs", "2", "--checkpoint", "off", "-q")  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    """Three rows whose answers have new tokens, and the file that names these."""
    Image.new("RGB", (40, 30), (200, 90, 30)).save(tmp_path / "0.png")
    rows = [
        {
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"a {text} here"},
            ],
        }
        for text in NEW[:3]
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "new.txt").write_text("\n".join(NEW) + "\n\n", encoding="utf-8")
    return path


def learn(run_main, data: Path, *more: object) -> Path:
    out = data.parent / "out"
    tokens = ("--add-tokens", data.parent / "new.txt")
    status, _, errors = run_main(main, PLAIN, data, "--out", out, *tokens, *QUICK, *more)
    assert status == 0, errors
    return out


def learnt(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "state.pt", weights_only=True)["learnt"]


def opened(folder: Path, **options) -> minillava.Assistant:
    return minillava.load(folder, device="cpu", dtype="float32", attention="eager", **options)


def check_tables(model, embedding: torch.Tensor, head: torch.Tensor, moved: bool) -> None:
    """Both tables have the new rows, and old ones that have moved or not."""
    base = opened(PLAIN).model.language_model
    for name, new in (("embed_tokens", embedding), ("lm_head", head)):
        table = model.language_model.get_submodule(name).weight
        assert table.shape[0] == FIRST + len(NEW) > OLD
        assert torch.equal(table[FIRST:], new), name
        old = base.get_submodule(name).weight
        assert torch.equal(table[:FIRST], old[:FIRST]) is not moved, name
        assert not torch.equal(new[0], old[:FIRST].mean(0)), name


@pytest.mark.parametrize("layout", ["hf", "llava"])
def test_the_rows_of_new_tokens_are_saved_with_a_lora(run_main, data, layout):
    """The tokens would be learnt and then lost, or the old rows move with them."""
    out = learn(run_main, data, "--layout", layout)
    rows = learnt(out)
    named = {"adapter": out} if layout == "hf" else {"model_base": PLAIN}
    assistant = opened(PLAIN if layout == "hf" else out, **named)
    check_tables(
        assistant.model, rows["language_model.embed_tokens.added"],
        rows["language_model.lm_head.added"], moved=False,
    )  # fmt: skip
    ids = assistant.tokenizer.encode(" ".join(NEW))
    assert [i for i in ids if i >= FIRST] == list(IDS.values())
    log = json.loads((out / "log.jsonl").read_text("utf-8").splitlines()[-1])
    assert set(log["rates"]) == {"LoRA", "new tokens", "projector"}


def test_a_whole_model_has_the_new_tokens(run_main, data):
    """Merged, its tables would be those of before, and its config.json say so."""
    out = learn(run_main, data, "--merged")
    rows, assistant = learnt(out), opened(out / "model")
    check_tables(
        assistant.model, rows["language_model.embed_tokens.added"],
        rows["language_model.lm_head.added"], moved=False,
    )  # fmt: skip
    assert assistant.model.config.text.vocab_size == FIRST + len(NEW)
    assert assistant.tokenizer.added["<gizmo>"] == FIRST


def test_a_language_model_that_learns_grows(run_main, data):
    """New rows begin as the mean of the old ones, also those that a padded table has already."""
    out = learn(run_main, data, "--learn", "language")
    rows, assistant = learnt(out), opened(out / "model")
    tables = [rows[f"language_model.{name}.weight"][FIRST:] for name in ("embed_tokens", "lm_head")]
    check_tables(assistant.model, *tables, moved=True)


def test_a_new_row_begins_as_the_mean_of_the_old_ones():
    """Of those that are tokens, beside which the rows that pad a table count for nothing."""
    for whole in (False, True):
        model = opened(PLAIN).model
        before = model.language_model.embed_tokens.weight.clone()
        logits = model([[1, 5, 9]]).logits
        model.requires_grad_(False)
        add_rows(model, IDS, whole)
        new = model.language_model.embed_tokens(torch.tensor([FIRST, FIRST + 7, 5]))
        assert torch.equal(new[0], before[:FIRST].mean(0)) and torch.equal(new[0], new[1])
        assert torch.equal(new[2], before[5])
        grown = model([[1, 5, 9]]).logits
        assert grown.shape[-1] == FIRST + len(NEW)
        assert torch.equal(grown[..., :FIRST], logits[..., :FIRST])


def test_new_tokens_learn_on_a_quantised_model(run_main, data):
    """Its head has no table to grow."""
    out = learn(run_main, data, "--quantize", "int8")
    rows = learnt(out)
    assistant = opened(PLAIN, adapter=out)
    check_tables(
        assistant.model, rows["language_model.embed_tokens.added"],
        rows["language_model.lm_head.added"], moved=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<gizmo>\n<gizmo>", "stands there twice"),
        ("</s>", "is a token already, 2"),
        ("<pad>", "is a token already, 441"),  # by which no text is meant
        ("a<image>b", "stands for a picture"),
        ("\n \n", "has no tokens"),
    ],
)
def test_what_cannot_be_added_is_told(tmp_path, text, told):
    """A token with two ids, or of a row that is another's, would be learnt as something else."""
    path, assistant = tmp_path / "new.txt", opened(PLAIN)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        new_ids(path, assistant.tokenizer, Folders(PLAIN))
    with pytest.raises(FileNotFoundError, match="no such file of tokens"):
        new_ids(tmp_path / "gone", assistant.tokenizer, Folders(PLAIN))


def test_new_tokens_need_rows_that_learn():
    """A projector alone would meet tokens that stay the mean of all others; and of one table for
    both ends, new rows alone would have two values."""
    with pytest.raises(ValueError, match="new tokens need theirs"):
        Recipe(learn="projector", add_tokens=IDS)
    model = opened(REFERENCE / "tied").model
    with pytest.raises(ValueError, match="one table for reading and for saying"):
        prepare(model, Recipe(rank=4, add_tokens=IDS))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_peft_and_transformers_have_the_new_tokens(run_main, data):
    """They would read them as letters, or answer without their rows."""
    hf = pytest.importorskip("hf")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    out = learn(run_main, data, "--merged")
    ours = opened(PLAIN, adapter=out)
    text = f"See {' '.join(NEW)} here"
    for folder in (out, out / "model"):  # AutoTokenizer takes another class for the second
        theirs = transformers.LlamaTokenizer.from_pretrained(folder)
        assert theirs(text).input_ids == ours.tokenizer.encode(text), folder
    base = hf.load(PLAIN)
    base.resize_token_embeddings(FIRST + len(NEW))
    adapted = peft.PeftModel.from_pretrained(base, out)
    ids = [[1, 5, 9, FIRST, FIRST + 7]]
    whole, told = transformers.LlavaForConditionalGeneration.from_pretrained(
        out / "model", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    with torch.no_grad():
        expected = ours.model(ids).logits
        adapted = adapted.merge_and_unload()
        for model in (adapted, whole):
            given = hf.inputs(model, ids)
            assert torch.equal(model(**given, use_cache=False).logits, expected)
