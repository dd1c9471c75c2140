"""A tokenizer.json of Llama's kind without its tokenizer.model: the same ids, or one line."""

import json
import random
import shutil

import pytest
from llama_json import as_json
from paths import REFERENCE
from sentencepiece import SentencePieceProcessor

import minillava
from minillava.files.llama_json import LlamaPieces
from minillava.inspection.report import inspect_folder
from minillava.tokenizer import Tokenizer

MODEL = REFERENCE / "plain" / "tokenizer.model"
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
LETTERS = "  abcdeéxyz019.,!?\n\t▁#<>s/ñ星🙂e\u0301\u00a0the ing star red blue circle"
WORDS = ["the", "star", "a", " ", "  ", "\n", "<s>", "</s>", "<0x0A>", "▁", "shape", "###", "星"]
COUNTS = [3000, pytest.param(20_000, marks=pytest.mark.slow)]


def texts(count: int):
    dice = random.Random(0)
    for number in range(count):
        some = LETTERS if number % 2 else WORDS
        yield "".join(dice.choice(some) for _ in range(dice.randrange(30)))


@pytest.fixture
def raw() -> dict:
    return as_json(SentencePieceProcessor(model_file=str(MODEL)))


@pytest.fixture
def folder(tmp_path, raw):
    """The stored `plain` model as transformers 5 saves it."""
    path = shutil.copytree(REFERENCE / "plain", tmp_path / "model")
    (path / "tokenizer.model").unlink()
    (path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return path


@pytest.mark.parametrize("count", COUNTS)
def test_it_cuts_as_sentencepiece_does(raw, count):
    """The same text would get other ids from tokenizer.json than from tokenizer.model, and the
    model would answer worse."""
    model, ours = SentencePieceProcessor(model_file=str(MODEL)), LlamaPieces(MODEL, raw)
    for text in texts(count):
        assert ours.encode(text) == model.encode(text), repr(text)
    for name in ("vocab_size", "bos_id", "eos_id", "unk_id"):
        assert getattr(ours, name)() == getattr(model, name)()
    for i in range(model.vocab_size()):
        assert ours.id_to_piece(i) == model.id_to_piece(i)
        assert ours.piece_to_id(model.id_to_piece(i)) == i
        for name in ("is_control", "is_unknown", "is_byte", "is_unused"):
            assert getattr(ours, name)(i) == getattr(model, name)(i), (name, i)


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_it_cuts_as_llamas_own_32000_pieces(llama_tokenizer, count):
    """A mistake that shows only with Llama's large vocabulary would pass the small one of the
    tests."""
    model = SentencePieceProcessor(model_file=str(llama_tokenizer))
    ours = LlamaPieces(llama_tokenizer, as_json(model))
    for text in texts(count):
        assert ours.encode(text) == model.encode(text), repr(text)


@pytest.mark.parity
@pytest.mark.parametrize("count", COUNTS)
def test_it_cuts_as_the_library_that_the_file_is_written_for(raw, count):
    """A tokenizer.json would be cut otherwise than by tokenizers, the library that wrote it."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(raw)), LlamaPieces(MODEL, raw)
    for text in texts(count):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_merges_are_pairs_or_texts(raw):
    """Files of newer releases, which write a merge as a pair, would be refused."""
    pairs = {**raw["model"], "merges": [m.split(" ") for m in raw["model"]["merges"]]}
    text = "a small purple ring at the top right"
    ids = LlamaPieces(MODEL, raw).encode(text)
    assert LlamaPieces(MODEL, {**raw, "model": pairs}).encode(text) == ids


def test_a_word_of_a_million_letters_is_cut_in_seconds(raw):
    """Trying every pair again after each merge would take hours."""
    ids = LlamaPieces(MODEL, raw).encode("star" * 50_000)
    assert len(ids) <= 200_001


def test_a_model_answers_without_its_tokenizer_model(folder, tmp_path):
    """A fine-tune that transformers 5 saved could not be opened."""
    saved = minillava.load(folder, device="cpu")
    whole = minillava.load(REFERENCE / "plain", device="cpu")
    prompt = whole.prompt("Is </s> or ### a star?\n\nYes.")
    assert saved.tokenizer.encode(prompt) == whole.tokenizer.encode(prompt)
    picture = REFERENCE / "pictures" / "grey.png"
    answers = [each.ask(picture, max_new_tokens=8) for each in (saved, whole)]
    assert answers[0] == answers[1]
    assert inspect_folder(folder).loadable


def test_the_form_without_a_space_after_tokens(folder, raw):
    """What transformers writes for `legacy` false."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**raw, "normalizer": None, "pre_tokenizer": FIRST}))
    (folder / "tokenizer_config.json").write_text("{}")
    ours, model = Tokenizer(folder / "tokenizer.model"), Tokenizer(MODEL, legacy=False)
    for text in ("a</s>USER: b", "a <s> b", "star", " star"):
        assert ours.encode(text) == model.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "prepares text in another way"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "prepares text in another way"),
        ({"normalizer": None}, "prepares text in another way"),
        ({"model.byte_fallback": False}, "prepares text in another way"),
        ({"model.merges": ["a b c"]}, "merges are not pairs"),
        ({"model.merges": [["never", "seen"]]}, "merges are not pairs"),
        ({"model.merges": [3]}, "merges are not pairs"),
        ({"model.vocab": {"<0x0A>": 5}}, "have holes"),
        ({"model.vocab": {"<0x0A>": "5"}}, "have holes"),
        ({"model.vocab": {"<0x0A>": 0}, "model.merges": []}, "lacks pieces of bytes"),
    ],
)
def test_another_form_or_a_damaged_file_is_one_line(folder, raw, change, message):
    """A tokenizer.json of another family would be read as Llama's and give wrong ids without an
    error."""
    for key, value in change.items():
        *outer, name = key.split(".")
        (raw["model"] if outer else raw)[name] = value
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as caught:
        minillava.load(folder, device="cpu")
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
