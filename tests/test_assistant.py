"""`load` and `Assistant` on the stored toy checkpoint."""

import json
import shutil

import pytest
import torch
from PIL import Image

import minillava
from minillava.assistant import choose_device, choose_dtype
from minillava.generate import generate
from minillava.prompt import DEFAULT_PROMPT, TEMPLATES


@pytest.fixture(scope="module")
def toy(reference):
    return minillava.load(reference / "plain", device="cpu", dtype="float32")


@pytest.fixture
def picture(reference):
    return reference / "pictures" / "landscape.png"


@pytest.fixture
def copy(reference, tmp_path):
    return shutil.copytree(reference / "plain", tmp_path / "weights")


def test_ask_stream_and_generate_say_the_same(toy, picture):
    question = "What is in this picture?"
    answer = toy.ask(picture, question, max_new_tokens=10)
    assert len(answer) > 0
    assert "".join(toy.stream(picture, question, max_new_tokens=10)) == answer
    ids = toy.tokenizer.encode(toy.prompt(question))
    result = generate(toy.model, [ids], toy.image_processor([picture]), max_new_tokens=10, tokenizer=toy.tokenizer)
    assert result.text == [answer]


def test_the_picture_matters(toy, picture):
    question = "What is in this picture?"
    other = Image.new("RGB", (60, 60), (200, 30, 30))
    assert toy.ask(picture, question, max_new_tokens=10) != toy.ask(other, question, max_new_tokens=10)


def test_several_pictures_and_none(toy, picture):
    one = toy.ask([picture], "Say.", max_new_tokens=5)
    assert one == toy.ask(picture, "Say.", max_new_tokens=5)
    assert toy.ask([picture, picture], "Say.", max_new_tokens=5) == toy.ask(
        [picture, picture], "<image>\n<image>\nSay.", max_new_tokens=5
    )
    assert isinstance(toy.ask(None, "Say.", max_new_tokens=5), str)


def test_the_prompt_is_the_exact_string(toy):
    system = TEMPLATES["llava_v1"].system
    assert toy.prompt("Why?") == f"{system} USER: <image>\nWhy? ASSISTANT:"
    assert toy.prompt("Why?", images=0) == f"{system} USER: Why? ASSISTANT:"
    assert toy.prompt("Why?", images=0, system="Hm.") == "Hm. USER: Why? ASSISTANT:"


def test_unknown_options_are_a_type_error(toy, picture):
    with pytest.raises(TypeError, match="max_tokens"):
        toy.ask(picture, DEFAULT_PROMPT, max_tokens=3)


def test_a_template_brings_its_stop_texts(reference):
    toy = minillava.load(reference / "plain", device="cpu", template="llava_v0")
    assert toy.options(stop=["x"]).stop == ("x", "###")


def test_the_template_does_not_come_from_the_folders_name(reference, tmp_path):
    folder = shutil.copytree(reference / "plain", tmp_path / "llava-llama-2-mpt-v0")
    assert minillava.load(folder, device="cpu").template is TEMPLATES["llava_v1"]


def test_attention_and_precision_are_what_was_asked_for(reference):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model = minillava.load(reference / "plain", device="cpu", dtype=name).model
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert choose_dtype("auto", "cuda", torch.float16) == torch.float16
    assert choose_dtype("auto", "cpu", torch.float16) in (torch.bfloat16, torch.float32)
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"device": "tpu"}, "unknown device 'tpu', expected one of: auto, cpu, cuda, mps"),
        ({"dtype": "int8"}, "unknown dtype 'int8', expected one of: auto, float32"),
        ({"attention": "flash"}, "unknown attention 'flash', expected one of: eager, fused"),
        ({"template": "v1"}, "unknown template 'v1'"),
        ({"image_aspect_ratio": "anyres"}, "unknown image aspect ratio 'anyres'"),
    ],
)
def test_unknown_choices_name_the_known_ones(reference, argument, message):
    with pytest.raises(ValueError, match=message):
        minillava.load(reference / "plain", **argument)


def test_pad_is_the_default_and_crop_a_choice(reference, picture):
    pad, crop = (minillava.load(reference / "plain", image_aspect_ratio=a).image_processor for a in (None, "crop"))
    assert (pad.aspect, crop.aspect) == ("pad", "crop")
    assert not torch.equal(pad([picture]), crop([picture]))


def test_preprocessing_numbers_come_from_the_folder(copy, picture):
    path = copy / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    plain = minillava.load(copy).image_processor
    path.write_text(json.dumps(raw | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}))
    changed = minillava.load(copy, image_aspect_ratio="crop").image_processor
    assert (changed.mean, changed.std) == ((0.5,) * 3, (0.25,) * 3)
    path.unlink()
    assert minillava.load(copy).image_processor.mean == plain.mean
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": raw | {"image_mean": [0.1, 0.2, 0.3]}}))
    assert minillava.load(copy).image_processor.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize is False, supported: True"),
        ({"resample": 2}, "resample is 2, supported: 3"),
        ({"crop_size": 224}, "crop_size is 224, config.json has image_size 56"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], expected three numbers"),
    ],
)
def test_preprocessing_we_do_not_do_is_refused(copy, change, message):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}"):
        minillava.load(copy)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(copy):
    path = copy / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"]["vocab_size"] = 100
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"tokenizer\.model has 440 pieces, config\.json a vocabulary of 100"):
        minillava.load(copy)
