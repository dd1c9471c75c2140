"""The files beside a tokenizer.model: what they say of added tokens, where they contradict, and
other families."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import hf
import pytest
import torch
from models import stored
from paths import REFERENCE
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

import minillava
from minillava.checkpoint.parts import open_tokenizer
from minillava.inspection.report import inspect_folder
from minillava.inspection.text import as_text
from minillava.tokenizer import Tokenizer

PIECES = 440  # of the toy tokenizer; its table has 448 rows
PLAIN = {
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": False,
}
ANOTHER = "another kind of tokenizer, which minillava does not read"


@pytest.fixture
def folder(tmp_path):
    """The stored `plain` model, without the files that name tokens."""
    path = tmp_path / "model"
    shutil.copytree(REFERENCE / "plain", path)
    (path / "tokenizer_config.json").unlink()
    return path


def write(folder, name, content) -> None:
    (folder / name).write_text(json.dumps(content))


def decoder(**ids) -> dict:
    """tokenizer_config.json as transformers 4 writes it."""
    return {
        "added_tokens_decoder": {
            str(i): {"content": f"<{name}>", **PLAIN} for name, i in ids.items()
        }
    }


def fast(**ids) -> dict:
    """tokenizer.json as transformers writes it, without its vocabulary."""
    return {"added_tokens": [{"id": i, "content": f"<{name}>", **PLAIN} for name, i in ids.items()]}


def complaint(folder) -> str:
    """What `load` says, which `inspect` says, too, and no other."""
    with pytest.raises((ValueError, OSError)) as caught:
        minillava.load(folder, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    report = inspect_folder(folder)
    assert report.problems == [message] and not report.loadable
    assert "it cannot be opened" in as_text(report)
    return message


# --- where the tokens are named -------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<box>": 442}},
        {"tokenizer_config.json": decoder(box=442)},
        {"tokenizer.json": fast(box=442)},
        {"added_tokens.json": {"<box>": 442}, "tokenizer.json": fast(box=442),
         "tokenizer_config.json": decoder(box=442)},
        {"added_tokens.json": {"<image>": 440, "<pad>": 441}, "special_tokens_map.json": {
            "additional_special_tokens": ["<box>"]}},
        {"added_tokens.json": {"<image>": 440, "<pad>": 441}, "special_tokens_map.json": {
            "additional_special_tokens": [{"content": "<box>", **PLAIN}]}},
        {"added_tokens.json": {"<image>": 440, "<pad>": 441}, "tokenizer_config.json": {
            "extra_special_tokens": ["<s>", "<box>"]}},
    ],
    ids=lambda files: "+".join(files),
)  # fmt: skip
def test_every_file_that_names_a_token_is_read(folder, files):
    """A token named in one of the files only would be cut into letters, which the model was never
    trained on."""
    for name, content in files.items():
        write(folder, name, content)
    assistant = minillava.load(folder, device="cpu", dtype="float32")
    assert 442 in assistant.tokenizer.encode(assistant.prompt("a <box>?"))
    assert inspect_folder(folder).tokenizer["added"]["<box>"] == 442


def test_flags_come_from_the_file_that_has_them(folder):
    """added_tokens.json has ids without flags: a token would lose that it takes spaces with it, or
    be shown in answers."""
    write(folder, "added_tokens.json", {"<box>": 442})
    entry = {"id": 442, "content": "<box>", **PLAIN, "rstrip": True, "special": True}
    write(folder, "tokenizer.json", {"added_tokens": [entry]})
    tokenizer = Tokenizer(folder / "tokenizer.model")
    assert tokenizer.encode("<box> \n")[1:] == [442]
    assert tokenizer.decode([442]) == ""


def test_special_tokens_map_makes_a_token_special(folder):
    """A special token would be shown in an answer, or a merely special one could not be written in
    a question."""
    write(folder, "added_tokens.json", {"<box>": 442, "<end>": 443})
    write(
        folder,
        "special_tokens_map.json",
        {"additional_special_tokens": ["<box>"], "eos_token": {"content": "<end>"}},
    )
    tokenizer = Tokenizer(folder / "tokenizer.model")
    assert tokenizer.decode([442, 443]) == ""
    assert tokenizer.by_id[443].control and not tokenizer.by_id[442].control


def test_legacy_of_a_tokenizer_that_transformers_5_saved(folder):
    """It writes no `legacy`; where its tokenizer.json puts "▁" before the first word alone, that is
    false."""
    for scheme, legacy in (("first", False), ("always", True)):
        write(
            folder,
            "tokenizer.json",
            {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": scheme}},
        )
        assert Tokenizer(folder / "tokenizer.model").legacy is legacy
    write(folder, "tokenizer_config.json", {"legacy": False})
    assert Tokenizer(folder / "tokenizer.model").legacy is False


def test_holes_and_a_pad_token_without_a_row_are_harmless(folder):
    """Many language models name a pad token that their table does not have; nobody looks it up."""
    write(folder, "added_tokens.json", {"<a>": 441, "<b>": 447, "[PAD]": 448, "<image>": 460})
    write(folder, "special_tokens_map.json", {"pad_token": "[PAD]"})
    tokenizer = minillava.load(folder, device="cpu").tokenizer
    assert tokenizer.encode("<a><b>") == [1, 441, 447]


def test_a_control_piece_may_have_another_name(folder):
    """The name that a checkpoint gives to one of the first pieces would be cut into letters."""
    write(
        folder,
        "tokenizer_config.json",
        {"added_tokens_decoder": {"0": {"content": "<unknown>", **PLAIN}}},
    )
    assert Tokenizer(folder / "tokenizer.model").encode("<unknown>") == [1, 0]


WRONG = {
    "another id": ({"added_tokens.json": {"<box>": 442}, "tokenizer_config.json": decoder(box=443)},
                   "added_tokens.json: '<box>' is 442, tokenizer_config.json says 443"),
    "another token": ({"tokenizer.json": fast(a=442), "tokenizer_config.json": decoder(b=442)},
                      "tokenizer.json: '<a>' is 442, tokenizer_config.json says that of '<b>'"),
    "one id twice": ({"added_tokens.json": {"<a>": 442, "<b>": 442}}, "added_tokens.json: '<b>' is 442"),
    "one token twice": ({"tokenizer_config.json": {"added_tokens_decoder": {
        i: {"content": "<a>", **PLAIN} for i in ("442", "443")}}}, "tokenizer_config.json: '<a>' is 443"),
    "a word's id": ({"added_tokens.json": {"<box>": 400}}, "added_tokens.json: '<box>' is 400, which is '"),
    "a word": ({"added_tokens.json": {"▁a": 442}}, "added_tokens.json: '▁a' is 442, tokenizer.model says 259"),
    "beyond the table": ({"added_tokens.json": {"<box>": 448}},
                         "'<box>' is 448, but config.json has a vocabulary of 448"),
    "far beyond": ({"tokenizer.json": fast(box=9000)}, "tokenizer.json: '<box>' is 9000, but config.json"),
    "a negative id": ({"added_tokens.json": {"<box>": -1}}, "'<box>' is -1, expected a token id"),
    "true": ({"added_tokens.json": {"<box>": True}}, "'<box>' is True, expected a token id"),
    "no number": ({"added_tokens.json": {"<box>": "442"}}, "'<box>' is '442', expected a token id"),
    "an empty token": ({"added_tokens.json": {"": 442}}, "token 442 is '', expected text"),
    "half a character": ({"added_tokens.json": {"\ud83d": 442}}, "expected text"),
    "the other way round": ({"added_tokens.json": {"442": "<box>"}}, "'442' is '<box>', expected a token id"),
    "a list": ({"added_tokens.json": ["<box>"]}, "added_tokens.json: holds a JSON list"),
    "a decoder that is a list": ({"tokenizer_config.json": {"added_tokens_decoder": ["<box>"]}},
                                 "tokenizer_config.json: added_tokens_decoder is not a token by "
                                 "id"),
    "a decoder of texts": ({"tokenizer_config.json": {"added_tokens_decoder": {"442": "<box>"}}},
                           "tokenizer_config.json: added_tokens_decoder is not a token by id"),
    "a token that is none": ({"tokenizer.json": {"added_tokens": {"<box>": 442}}},
                             "tokenizer.json: added_tokens is not a list of tokens"),
    "a flag": ({"tokenizer.json": {"added_tokens": [{"id": 442, "content": "<box>", "lstrip": "yes"}]}},
               "tokenizer.json: lstrip of '<box>' is 'yes', expected true or false"),
    "a name": ({"special_tokens_map.json": {"eos_token": 2}}, "special_tokens_map.json: eos_token is 2, expected text"),
    "names": ({"special_tokens_map.json": {"additional_special_tokens": [5]}}, "additional_special_tokens is [5]"),
    "legacy": ({"tokenizer_config.json": {"legacy": "no"}}, "tokenizer_config.json: legacy is 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_files_that_contradict_get_one_error_that_names_one(folder, kind):
    """Of two files that give a token different ids, one would win without an error."""
    files, expected = WRONG[kind]
    for name, content in files.items():
        write(folder, name, content)
    assert expected in complaint(folder)


def test_a_picture_is_not_penalised_as_the_token_that_has_its_id(folder):
    """LLaVA's config.json names no id for pictures; 32000, which it then is, may be a fine-tune's
    first token."""
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", {**config, "image_token_index": 442})
    assert minillava.load(folder, device="cpu").model.config.image_token_id == 442
    write(folder, "added_tokens.json", {"<box>": 442})
    assistant = minillava.load(folder, device="cpu", dtype="float32")
    assert assistant.model.config.image_token_id == -200
    plain = stored()
    picture, options = (
        REFERENCE / "pictures" / "landscape.png",
        {"max_new_tokens": 8, "repetition_penalty": 1.5},
    )
    plain.model.config = replace(plain.model.config, image_token_id=10**6)
    assert assistant.ask(picture, "What?", **options) == plain.ask(picture, "What?", **options)


# --- tokenizers of other families -----------------------------------------------------------------


def byte_level(pieces: int = 512) -> dict:
    """tokenizer.json as Llama 3, Qwen and GPT-NeoX have it."""
    vocabulary = {f"t{i}": i for i in range(pieces)}
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel"},
    }


def llama_2(folder) -> dict:
    """tokenizer.json of the tokenizer.model in the folder."""
    model = Tokenizer(folder / "tokenizer.model").sentencepiece
    return {
        "model": {
            "type": "BPE",
            "vocab": {model.id_to_piece(i): i for i in range(PIECES)},
            "merges": [],
        }
    }


def with_rows(folder, rows: int) -> None:
    """Tables of so many rows."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.zeros(rows, tensors[name].shape[1], dtype=tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = config["text_config"]["vocab_size"] = rows
    write(folder, "config.json", config)


def test_another_family_is_not_sent_to_llama_2(folder):
    """The advice to copy Llama 2's tokenizer.model made a model that opened and answered
    rubbish."""
    (folder / "tokenizer.model").unlink()
    write(folder, "tokenizer.json", byte_level())
    message = complaint(folder)
    assert "tokenizer.json" in message and ANOTHER in message and "copy" not in message


@pytest.mark.parametrize(
    "vocabulary", [[["▁the", -3.5], ["</s>", 0]], {"[UNK]": 0, "the": 1}], ids=["T5", "BERT"]
)
def test_other_models_than_bpe_are_another_kind(folder, vocabulary):
    """A tokenizer.json of T5 or BERT would end in a traceback of code that expects merges."""
    (folder / "tokenizer.model").unlink()
    write(folder, "tokenizer.json", {"model": {"vocab": vocabulary}})
    assert ANOTHER in complaint(folder)


@pytest.mark.parametrize("copied", [False, True], ids=["as downloaded", "tokenizer.model copied"])
@pytest.mark.parametrize(
    "name",
    ["vocab.json", "merges.txt", "vocab.txt", "qwen.tiktoken", "tekken.json", "spiece.model",
     "sentencepiece.bpe.model"],
)  # fmt: skip
def test_files_of_other_tokenizers(folder, name, copied):
    """A tokenizer.model beside them was believed, whoever put it there."""
    if not copied:
        (folder / "tokenizer.model").unlink()
    (folder / name).write_text("{}")
    message = complaint(folder)
    assert name in message and ANOTHER in message and "copy tokenizer.model" not in message
    assert ("tokenizer.model is not its own" in message) == copied


@pytest.mark.parametrize("copied", [False, True], ids=["as downloaded", "tokenizer.model copied"])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GemmaTokenizerFast", "T5Tokenizer"])
def test_the_class_of_another_tokenizer(folder, name, copied):
    """The advice to copy Llama's tokenizer.model would be given for a model of another family,
    where it yields nonsense."""
    if not copied:
        (folder / "tokenizer.model").unlink()
    write(folder, "tokenizer_config.json", {"tokenizer_class": name})
    assert ANOTHER in complaint(folder)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    if copied:
        minillava.load(folder, device="cpu")
    else:
        assert "copy tokenizer.model" in complaint(folder)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_class_of_any_family_needs_the_file_that_says_which(folder, name):
    """A class that any family uses would be taken for Llama's by guess."""
    raw = llama_2(folder)
    write(folder, "tokenizer_config.json", {"tokenizer_class": name})
    said = f"tokenizer_class is {name}, which may be of any family; download the tokenizer.json"
    assert said in complaint(folder)
    kept = (folder / "tokenizer.model").rename(folder / "kept")
    assert said in complaint(folder)
    kept.rename(folder / "tokenizer.model")
    write(folder, "tokenizer.json", raw)
    assert minillava.load(folder, device="cpu").tokenizer.encode("a")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"add_bos_token": False}, "add_bos_token is False, supported: True"),
        ({"add_eos_token": True}, "add_eos_token is True, supported: False"),
        ({"bos_token": "</s>"}, "bos_token is '</s>', supported: '<s>'"),
        ({"bos_token": {"content": "<begin>", **PLAIN}}, "bos_token is '<begin>', supported"),
    ],
)
def test_another_frame_around_a_prompt_is_refused(folder, settings, said):
    """transformers obeys these; prompts were framed by <s> and nothing, whatever the file said."""
    write(folder, "tokenizer_config.json", settings)
    assert f"tokenizer_config.json: {said}" in complaint(folder)


def test_llava_16_34b_is_refused_by_its_tokenizer(folder):
    """Its prompts begin without a begin token, and its tokens of chat are pieces of its
    tokenizer.model: opened as a Vicuna, it would answer worse."""
    write(folder, "tokenizer_config.json", {"add_bos_token": False, "bos_token": "<s>"})
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found |= {"model_type": "llava_next", "image_grid_pinpoints": [[56, 112], [112, 56]]}
    write(folder, "config.json", found)
    told = complaint(folder)
    assert "add_bos_token is False, supported: True" in told and "\n" not in told


def test_the_usual_frame_may_be_stated(folder):
    """A folder that states what is the default anyway would be refused."""
    stated = {"add_bos_token": True, "add_eos_token": None, "bos_token": "<s>", "eos_token": "</s>"}
    write(folder, "tokenizer_config.json", stated)
    assert minillava.load(folder, device="cpu").tokenizer.encode("")[:1] == [1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "cut short, or of another family"),  # SentencePiece's defaults, as T5 has them
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False}, ANOTHER),
    ],
)
def test_a_sentencepiece_model_of_another_family(folder, settings, said):
    """T5's tokenizer.model is a SentencePiece model, too: it would load and give ids that mean
    other words."""
    texts, model = ["the red star is on the left", "a b"] * 50, io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        minloglevel=2, **settings,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    assert said in complaint(folder)


def test_a_tiktoken_vocabulary_of_the_same_name(folder):
    """Meta's own Llama 3 calls it tokenizer.model, too."""
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    message = complaint(folder)
    assert "is a tiktoken vocabulary" in message and ANOTHER in message


def test_llama_2_s_own_tokenizer_json_keeps_the_advice(folder):
    """Users of Llama 2, whose tokenizer.model can be copied, would be told that their model is of
    another family."""
    raw = llama_2(folder)
    (folder / "tokenizer.model").unlink()
    write(folder, "tokenizer.json", raw)
    found = complaint(folder)
    assert "tokenizer.json: prepares text in another way" in found
    assert "copy the tokenizer.model of this language model" in found


def test_a_vocabulary_that_no_known_tokenizer_model_has(folder):
    """A user with a Llama 3 model would look for a tokenizer.model that does not exist."""
    (folder / "tokenizer.model").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 128_320
    write(folder, "config.json", config)
    with pytest.raises(
        FileNotFoundError,
        match=r"whose vocabulary is about 128,320, or, if it has none \(as Llama 3",
    ):
        minillava.load(folder, device="cpu")


def test_a_tokenizer_model_that_was_copied_to_a_model_of_another_kind(folder):
    """A copied tokenizer.model would hide that the folder's own tokenizer is of another kind."""
    write(folder, "tokenizer.json", byte_level())
    message = complaint(folder)
    assert ANOTHER in message and "tokenizer.model is not its own" in message


def test_a_tokenizer_model_of_the_same_family_but_of_another_model(folder):
    """Mistral's has as many pieces as Llama 2's."""
    raw = llama_2(folder)
    pieces = raw["model"]["vocab"]
    pieces["▁a"], pieces["▁d"] = pieces["▁d"], pieces["▁a"]
    write(folder, "tokenizer.json", raw)
    assert re.search(
        r"tokenizer\.model: '▁a' is 259, in \S+tokenizer\.json \d+; copy", complaint(folder)
    )
    del pieces["▁a"]
    write(folder, "tokenizer.json", raw)
    assert "tokenizer.json not there" in complaint(folder)


def test_its_own_tokenizer_json_is_no_hindrance(folder):
    """The check against copied tokenizers would refuse Llama 2's own pair of files."""
    write(folder, "tokenizer.json", llama_2(folder) | fast(box=447))
    assert minillava.load(folder, device="cpu").tokenizer.encode("<box>") == [1, 447]


@pytest.mark.parametrize(
    ("rows", "opens"), [(440, True), (443, True), (512, True), (640, True), (704, False)]
)
def test_rows_without_a_token_are_padding_or_another_tokenizer(folder, rows, opens):
    """A copied tokenizer.model of 32,000 pieces opened a model of 128,320 rows."""
    with_rows(folder, rows)
    if opens:
        assert minillava.load(folder, device="cpu").model.config.text.vocab_size == rows
        assert inspect_folder(folder).loadable
    else:
        message = complaint(folder)
        assert (
            "has 440 pieces and with added tokens 440 ids, config.json a vocabulary of 704"
            in message
        )
        assert ANOTHER in message and "download added_tokens.json" in message
        write(folder, "added_tokens.json", {f"<loc_{i}>": 440 + i for i in range(200)})
        assert minillava.load(folder, device="cpu").tokenizer.encode("<loc_199>") == [1, 639]


# --- whose files ----------------------------------------------------------------------------------


def test_an_adapter_brings_the_tokenizer_of_its_run(folder, tmp_path):
    """Its files stand together; a tokenizer.model that it left out is the base's."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write(folder, "added_tokens.json", {"<old>": 442})
    assert open_tokenizer([adapter, folder]).added == {"<old>": 442}
    write(adapter, "tokenizer_config.json", {**decoder(box=443), "legacy": False})
    found = open_tokenizer([adapter, folder])
    assert (found.added, found.legacy) == ({"<box>": 443}, False)
    shutil.copy(folder / "tokenizer.model", adapter)
    (folder / "tokenizer.model").unlink()
    assert open_tokenizer([adapter, folder]).encode("<box>") == [1, 391, 443]


def test_load_and_inspect_take_the_adapter_s_tokenizer(folder, tmp_path):
    """Tokens that an adapter was trained with would be cut into letters, or inspect would not show
    them."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    width = load_file(folder / "model.safetensors")[
        "language_model.model.layers.0.self_attn.q_proj.weight"
    ].shape
    pair = {
        f"{name}.lora_A.weight": torch.ones(1, width[1]),
        f"{name}.lora_B.weight": torch.ones(width[0], 1),
    }
    save_file(pair, adapter / "adapter_model.safetensors")
    write(
        adapter,
        "adapter_config.json",
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "layers_to_transform": [0]},
    )
    hf.write_json(decoder(box=443), adapter / "tokenizer_config.json")
    assistant = minillava.load(folder, adapter=adapter, device="cpu")
    assert assistant.tokenizer.encode("<box>") == [1, 443]
    report = inspect_folder(folder, adapter=adapter)
    assert report.loadable and report.tokenizer["added"] == {"<box>": 443}
    assert minillava.load(folder, device="cpu").tokenizer.added == {}
