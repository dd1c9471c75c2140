"""A byte-level tokenizer.json, as Llama 3 and Qwen2 have it: the ids and the text that the library
gives which such a file is written for, or one line."""

import json
import random
import shutil
import sys
import unicodedata

import pytest
from folders import change_config
from paths import REFERENCE

import minillava
from minillava.checkpoint.folders import Folders
from minillava.convert.plan import renamed
from minillava.files.byte_json import BytePieces, cut_words
from minillava.finetune.tokens import new_ids
from minillava.generate.inputs import fewest_tokens
from minillava.inspection.report import inspect_folder
from minillava.templates import TEMPLATES
from minillava.tokenizer import TextDecoder, Tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama": PATTERN, "qwen": PATTERN.replace("{1,3}", "")}
CORPUS = [
    "The red star is on the left, isn't it? I'll say they've 1234 stars in 2024.",
    "Ein großer roter Stern ist links; où est l'étoile? ¿Dónde está la niña?",
    "красная звезда слева 星星在左边 赤い星は左にあります 빨간 별 نجمة حمراء כוכב אדום लाल तारा ดาวแดง",
    "  for i in range(10):\n\t\tprint('x')\r\n\r\n   🙂🙂 👩‍👩‍👧 e\u0301 ½ Ⅷ ¾",
] * 3
NAMES = ["<|begin|>", "<|end|>", "<|turn|>", "<box>", "▁tag▁"]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
SCRIPTS = [
    "abcdeXYZ stIlmrvd'", "0123456789٣५Ⅷ½²〇", " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000",
    "äéñßſKİıǅ", "e\u0301o\u0308\u0323A\u030a", "звезда", "星星左边赤い별", "نجمةכוכב", "लाल ताराดาว", ".,!?_-#<|>()'’",
    "🙂👩\u200d👧🏽🇩🇪", "Ġ▁\ufffd\ufeff\x00", "\u212b\uac00\u1100\u1161",
]  # fmt: skip
WORDS = [
    "'s",
    "'LL",
    "'ſ",
    " the",
    "  ",
    "\n\n",
    " \n ",
    "\x1f\n",
    "12345",
    *NAMES,
    "<|beg",
    "star",
    "\r\n",
]


def alphabet() -> dict[int, str]:
    """The 256 characters that stand for bytes, by the rule of GPT-2: printable Latin-1 as it is,
    the others from 256 on."""
    found, following = {}, 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        found[byte] = chr(byte if printable else following)
        following += not printable
    return found


def file_of(kind: str, vocab: dict, merges: list) -> dict:
    """tokenizer.json of Llama 3's form (a begin token, whole words, no normaliser) or Qwen2's."""
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[kind]}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokens = [
        {"id": len(vocab) + i, "content": name, "special": i < 3, **FLAGS}
        for i, name in enumerate(NAMES)
    ]
    begin = {"id": NAMES[0], "ids": [len(vocab)], "tokens": [NAMES[0]]}
    frame = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": NAMES[0], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {NAMES[0]: begin},
    }
    llama = kind == "llama"
    level_after = {**level, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": None if llama else {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**level, "use_regex": False}],
        },
        "post_processor": {"type": "Sequence", "processors": [level_after, frame]}
        if llama
        else level_after,
        "decoder": level_after,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None if llama else "",
            "end_of_word_suffix": None if llama else "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": llama,
            "vocab": vocab,
            "merges": merges,
        },
    }


def small(kind: str) -> dict:
    """A file with a piece for each byte and a few words."""
    letters = [*alphabet().values()]
    merges = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("s", "t"), ("a", "r"), ("st", "ar")]
    vocab = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in merges)])}
    return file_of(kind, vocab, [list(pair) for pair in merges])


def trained(kind: str) -> dict:
    """A file whose pieces the library learnt; "whole words" is a word that no merge makes."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(small(kind)))
    letters = [*alphabet().values()]
    theirs.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=letters, show_progress=False
        ),
    )
    model = json.loads(theirs.to_str())["model"]
    vocab = {**model["vocab"]}
    vocab["Ġzzz"] = len(vocab)
    return file_of(kind, vocab, model["merges"])


def texts(count: int):
    """Strings of many scripts, digits, contractions, whitespace and added tokens; no character that
    Python's table does not know yet."""
    dice = random.Random(0)
    known = [
        c
        for c in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(c) not in ("Cn", "Cs")
    ]
    for _ in range(count):
        parts = []
        for _ in range(dice.randrange(12)):
            kind = dice.randrange(4)
            some = WORDS if kind == 0 else known if kind == 1 else dice.choice(SCRIPTS)
            parts += [dice.choice(some) for _ in range(dice.randrange(1, 4))]
        yield "".join(parts)


def opened(path, raw: dict) -> Tokenizer:
    (path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return Tokenizer(path / "tokenizer.model")


@pytest.fixture
def folder(tmp_path):
    """The stored `plain` model with a tokenizer of bytes, as a LLaVA on Llama 3 has it."""
    path = shutil.copytree(REFERENCE / "plain", tmp_path / "model")
    (path / "tokenizer.model").unlink()
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer.json").write_text(json.dumps(small("llama")), encoding="utf-8")
    return path


@pytest.mark.parity
@pytest.mark.parametrize("count", [3000, pytest.param(30_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PATTERNS)
def test_it_cuts_and_decodes_as_the_library_that_the_file_is_written_for(kind, count, tmp_path):
    """Other ids than those of the training make a model answer worse without an error."""
    raw = trained(kind)
    tokenizers = pytest.importorskip("tokenizers", reason="the fuzz compares with tokenizers")
    theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(raw)), opened(tmp_path, raw)
    assert ours.encode("")[:1] == ([raw["added_tokens"][0]["id"]] if kind == "llama" else [])
    for text in (*texts(count), "Ġzzz zzz", " zzz", *CORPUS):
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert fewest_tokens(text, ours) <= len(ids), repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        half = ids[1::2]  # characters without their ends
        if raw["added_tokens"][-1]["id"] not in half:
            assert ours.decode(half) == theirs.decode(half), half


def test_letters_and_numbers_are_those_of_the_unicode_table():
    r"""Python has no \p{L} and \p{N}; a class put together from \w would take a letter for a
    symbol, and every word with it would be cut otherwise."""
    letters, numbers = [], []
    for c in map(chr, range(sys.maxunicode + 1)):
        kind = unicodedata.category(c)
        (letters if kind[0] == "L" else numbers if kind[0] == "N" else []).append(c)
    assert cut_words("".join(letters), "") == ["".join(letters)]
    assert cut_words("".join(numbers), "") == numbers
    others = "".join(
        c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] in "PSM"
    )
    assert cut_words(others, "") == [others]
    assert cut_words("a\x1cb\x1c\x1d \u2003c", "") == ["a", "\x1cb", "\x1c\x1d", " ", "\u2003c"]


def test_a_character_streams_once_it_is_whole(tmp_path):
    """Half a character would be shown as U+FFFD while the other half is still to come."""
    tokenizer = opened(tmp_path, small("qwen"))
    ids = tokenizer.encode(" é🙂 the")
    decoder = TextDecoder(tokenizer)
    assert [decoder.feed(i) for i in ids] == [" ", "", "é", "", "", "", "🙂", " the"]
    assert [decoder.feed(i) for i in ids[:2]] == [" ", ""] and decoder.flush() == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("▁tag▁ a")) == "▁tag▁ a"


def test_qwen_has_no_begin_token_and_normalises(tmp_path):
    """A begin token that the model never saw would stand before every prompt; an "é" of two
    characters would be other ids than that of one."""
    tokenizer = opened(tmp_path, small("qwen"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.bos_id == -1
    assert fewest_tokens("\u03b9\u0308\u0301" * 1000, tokenizer) <= 2000


def test_a_model_on_llama_answers_with_it(folder):
    """A Llama-architecture folder with a tokenizer of bytes could not be opened. A separator that a
    user types must not become the token."""
    assistant = minillava.load(folder, device="cpu")
    prompt = assistant.prompt("Is <|begin|> the <|turn|> star?\n\nYes.")
    ids = assistant.tokenizer.encode(prompt)
    begin, _, turn, *_ = (token["id"] for token in small("llama")["added_tokens"])
    assert ids[0] == begin and ids.count(begin) == 1 and turn in ids and -200 in ids
    assert assistant.tokenizer.decode(ids).startswith("A chat between a curious human")
    answer = assistant.ask(REFERENCE / "pictures" / "grey.png", max_new_tokens=8)
    assert isinstance(answer, str)
    assert inspect_folder(folder).loadable


def test_a_model_on_llama_3_is_asked_in_its_own_form(folder):
    """In the words of a Vicuna it answers worse, and does not know where to stop."""
    raw = small("llama")
    last = raw["added_tokens"][-1]
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    for i, name in enumerate(names, 1):
        raw["added_tokens"].append({**last, "id": last["id"] + i, "content": name, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assistant = minillava.load(folder, device="cpu")
    assert assistant.template is TEMPLATES["llama_3"]
    assert assistant.options().stop == ("<|eot_id|>", "<|end_of_text|>")
    ids = assistant.tokenizer.encode(assistant.prompt("a<|eot_id|>b"))
    assert ids.count(last["id"] + 3) == 1  # what is typed ends no turn


def test_a_folder_that_cannot_be_written_in_another_layout_is_one_line(folder):
    """convert ended in a traceback."""
    with pytest.raises(ValueError, match=r"there is no tokenizer\.model beside it"):
        renamed(Folders(folder), "original", None, None)


def test_a_language_model_of_another_type_is_still_one_line(folder):
    """A tokenizer that can be read must not open a model that cannot."""
    change_config(folder, text_config={"model_type": "qwen3"})
    with pytest.raises(ValueError, match="qwen3") as caught:
        minillava.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_word_of_eighty_thousand_letters_is_cut_in_seconds(tmp_path):
    """Trying every pair again after each merge would take hours."""
    assert len(opened(tmp_path, small("llama")).encode("star" * 20_000)) == 20_001


SPLIT = "pre_tokenizer.pretokenizers"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("normalizer", {"type": "NFKC"}, "normalizer is .'type': 'NFKC'., supported"),
        ("decoder", None, "decoder is None, supported of byte-level tokenizers: 'ByteLevel'"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\w+"}, "cuts words by the pattern"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}, "cuts words by the pattern"),
        ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "behavior is 'Removed'"),
        ("pre_tokenizer.pretokenizers.0.invert", True, "invert is True"),
        ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "add_prefix_space is True"),
        ("pre_tokenizer.pretokenizers.1.use_regex", True, "use_regex is True"),
        ("model.dropout", 0.1, "dropout is 0.1"),
        ("model.byte_fallback", True, "byte_fallback is True"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix is '</w>'"),
        ("model.merges", ["t"], "merges are not pairs"),
        ("model.merges", [["never", "seen"]], "merges are not pairs"),
        ("model.vocab", {"a": 0}, "lacks pieces of bytes"),
        ("model.vocab", {"a": 5}, "have holes"),
        ("model.vocab", {"a": [0]}, "have holes"),
        ("model.vocab", [["a", 0]], "have holes"),
        ("post_processor", {"type": "RobertaProcessing"}, "post_processor is"),
        ("post_processor.processors.1.special_tokens", {}, "post_processor is"),
        ("post_processor.processors.1.single", [], "post_processor is"),
        ("added_tokens.3.rstrip", True, "rstrip of '<box>' is True"),
        ("added_tokens.3.single_word", True, "single_word of '<box>' is True"),
        ("added_tokens", 5, "post_processor is|added_tokens is not"),
    ],
)  # fmt: skip
def test_what_is_not_done_here_is_one_line(folder, where, value, message):
    """A file that asks for another way of cutting would give wrong ids without an error."""
    raw = small("llama")
    *outer, name = where.split(".")
    place = raw
    for key in outer:
        place = place[int(key) if key.isdigit() else key]
    place[name] = value
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as caught:
        minillava.load(folder, device="cpu")
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    assert inspect_folder(folder).problems == [str(caught.value)]


def test_a_token_that_is_normalised_is_one_line(tmp_path):
    """Under NFC it would be found in other places than where it is written."""
    raw = small("qwen")
    raw["added_tokens"][3]["normalized"] = True
    with pytest.raises(ValueError, match="normalized of '<box>' is True"):
        opened(tmp_path, raw)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos_token": "<|end|>"}, "bos_token is '<.end.>', supported: '<.begin.>'"),
        ({"add_bos_token": False}, "add_bos_token is False, supported: True"),
        ({"added_tokens_decoder": {"5": {"content": "<|turn|>"}}}, "is 5, which is"),
    ],
)
def test_files_beside_it_must_agree(folder, settings, message):
    """Of two files that contradict each other one would be believed."""
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as caught:
        minillava.load(folder, device="cpu")
    assert "tokenizer.model" not in str(caught.value)


def test_the_alphabet_has_every_byte():
    """A piece would be decoded to other bytes than it was made of."""
    pieces = BytePieces(REFERENCE, small("llama"))
    assert [pieces.bytes_of(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_a_piece_is_no_new_token(tmp_path):
    """Without a begin token the first piece of a text was taken for one, and what is a token
    already was added again."""
    tokenizer = opened(tmp_path, small("qwen"))
    (tmp_path / "new.txt").write_text("ar", encoding="utf-8")
    with pytest.raises(ValueError, match="'ar' is a token already"):
        new_ids(tmp_path / "new.txt", tokenizer, Folders(tmp_path))
