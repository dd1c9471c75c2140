"""`load` and `Assistant` on the stored toy checkpoint."""

import json
import re
import shutil
from collections import deque
from dataclasses import replace

import pytest
import torch
from models import stored
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

import minillava
from minillava.chat.conversation import Conversation
from minillava.checkpoint.folders import bundled_weights
from minillava.checkpoint.place import LARGE, choose_device, choose_dtype
from minillava.files.tokenizer_files import AddedToken
from minillava.generate.contrast import M3ID, VCD
from minillava.generate.generation import generate
from minillava.generate.inputs import longest_piece
from minillava.labels import encode_answers
from minillava.look.run import look
from minillava.prompt import DEFAULT_PROMPT
from minillava.templates import TEMPLATES
from minillava.tracing.run import trace


@pytest.fixture(scope="module")
def toy(reference):
    return stored()


@pytest.fixture
def picture(reference):
    return reference / "pictures" / "landscape.png"


@pytest.fixture
def copy(reference, tmp_path):
    return shutil.copytree(reference / "plain", tmp_path / "weights")


def test_ask_stream_and_generate_say_the_same(toy, picture):
    """One of the three ways to an answer would drop its first space or its last token."""
    question = "What is in this picture?"
    answer = toy.ask(picture, question, max_new_tokens=10)
    assert len(answer) > 0
    assert "".join(toy.stream(picture, question, max_new_tokens=10)) == answer
    ids = toy.tokenizer.encode(toy.prompt(question))
    result = generate(
        toy.model, [ids], toy.image_processor([picture]), max_new_tokens=10, tokenizer=toy.tokenizer
    )
    assert result.text == [answer]


def test_ask_and_score_use_the_context_that_linear_scaling_makes(copy, picture):
    """`ask` refused a prompt of more positions than max_position_embeddings, which scaling by 4
    makes 512."""
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {
        "max_position_embeddings": 128,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stretched = minillava.load(copy, device="cpu", dtype="float32")
    question = "What is in this picture? " * 8
    length = stretched.prepare(picture, stretched.prompt(question)).embeds.shape[1]
    assert 128 < length < 500
    assert len(stretched.tokenizer.encode(stretched.ask(picture, question, max_new_tokens=5))) > 1
    assert stretched.score(picture, question, ["Yes."])[0] < 0
    with pytest.raises(ValueError, match="context holds 512"):
        stretched.ask(picture, question * 8)


def test_the_picture_matters(toy, picture):
    """A picture that never reaches the language model still gets a fluent answer."""
    question = "What is in this picture?"
    other = Image.new("RGB", (60, 60), (200, 30, 30))
    assert toy.ask(picture, question, max_new_tokens=10) != toy.ask(
        other, question, max_new_tokens=10
    )


def test_several_pictures_and_none(toy, picture):
    """A list of one picture would be asked otherwise than the picture alone, or a second picture
    would be dropped."""
    one = toy.ask([picture], "Say.", max_new_tokens=5)
    assert one == toy.ask(picture, "Say.", max_new_tokens=5)
    assert toy.ask([picture, picture], "Say.", max_new_tokens=5) == toy.ask(
        [picture, picture], "<image>\n<image>\nSay.", max_new_tokens=5
    )
    assert isinstance(toy.ask(None, "Say.", max_new_tokens=5), str)


def test_a_list_of_questions_is_answered_as_one_by_one(toy, picture, monkeypatch):
    """Questions of different lengths in one batch would see each other's padding or pictures, and a
    picture asked about twice be encoded twice."""
    other = Image.new("RGB", (60, 60), (200, 30, 30))
    images = [picture, None, [other, picture], other, str(picture)]
    questions = [
        "What is it?",
        "Hello?",
        "Which one is the larger of the two?",
        "Why?",
        "What is it?",
    ]
    expected = [toy.ask(i, q, max_new_tokens=6) for i, q in zip(images, questions, strict=True)]
    encoded = []
    encode = toy.encode
    monkeypatch.setattr(toy, "encode", lambda picture: encoded.append(picture) or encode(picture))
    assert toy.ask(images, questions, max_new_tokens=6) == expected
    assert len(encoded) == 2
    # another kind of list was taken for the pictures of one prompt
    assert toy.ask(deque(images), questions, max_new_tokens=6) == expected


def test_one_picture_or_none_for_a_list_of_questions(toy, picture):
    """Questions and pictures of different counts would be paired up to the shorter list, and the
    rest be forgotten."""
    questions = ["What?", "And why is that so?"]
    for image in (picture, None):
        assert toy.ask(image, questions, max_new_tokens=5) == [
            toy.ask(image, q, max_new_tokens=5) for q in questions
        ]
    assert toy.ask([], []) == toy.ask(picture, []) == []
    with pytest.raises(ValueError, match=r"2 question\(s\) but 3 picture\(s\)"):
        toy.ask([picture] * 3, questions)


def test_lists_of_seeds_beams_answers_and_contrast(toy, picture):
    """Each as one by one; a seed each makes samples independent of the rest of the batch."""
    questions, images = ["What?", "And why is that so?"], [picture, [picture, picture]]
    for each, options in (
        ([{"seed": 3}, {"seed": 4}], {"temperature": 1.5, "seed": [3, 4]}),
        ([{}, {}], {"num_beams": 3}),
        ([{"seed": [5]}, {"seed": 6}], {"contrast": VCD(), "seed": [5, 6]}),
        ([{}, {}], {"contrast": M3ID()}),
    ):
        assert toy.ask(images, questions, max_new_tokens=5, **options) == [
            toy.ask(image, question, max_new_tokens=5, **{**options, **own})
            for image, question, own in zip(images, questions, each, strict=True)
        ]
    with pytest.raises(ValueError, match="3 seeds for 2 rows"):
        toy.ask(images, questions, temperature=1.0, seed=[1, 2, 3])


def test_the_prompt_is_the_exact_string(toy):
    """A space or line break more than in training makes the answers worse, and nothing says so."""
    system = TEMPLATES["llava_v1"].system
    assert toy.prompt("Why?") == f"{system} USER: <image>\nWhy? ASSISTANT:"
    assert toy.prompt("Why?", images=0) == f"{system} USER: Why? ASSISTANT:"
    assert toy.prompt("Why?", images=0, system="Hm.") == "Hm. USER: Why? ASSISTANT:"


def test_a_system_text_of_ones_own(toy, picture):
    """A system text that the user gives would be ignored."""
    assert toy.ask(picture, "Say.", system="Hm.", max_new_tokens=5) != toy.ask(
        picture, "Say.", max_new_tokens=5
    )


def test_what_was_not_needed_is_named(toy):
    """A user could not see which tensors of a checkpoint the model leaves out."""
    assert "vision_tower.vision_model.post_layernorm.weight" in toy.unused
    assert any(".encoder.layers.2." in name for name in toy.unused)  # the last of three


def test_unknown_options_are_a_type_error(toy, picture):
    """A misspelled option would be ignored, and the answer come out with the default."""
    with pytest.raises(TypeError, match="max_tokens"):
        toy.ask(picture, DEFAULT_PROMPT, max_tokens=3)


def test_a_template_brings_its_stop_texts(reference):
    """With v0's template an answer would go on and write the user's next question."""
    toy = minillava.load(reference / "plain", device="cpu", template="llava_v0")
    assert toy.options(stop=["x"]).stop == ("x", "###")


def test_the_template_does_not_come_from_the_folders_name(reference, tmp_path):
    """Renaming a folder would change the answers."""
    folder = shutil.copytree(reference / "plain", tmp_path / "llava-llama-2-mpt-v0")
    assert minillava.load(folder, device="cpu").template is TEMPLATES["llava_v1"]


def test_the_template_comes_from_the_tokens_that_were_added_for_it(reference, tmp_path):
    """A Phi-3 was asked in the words of a Vicuna, and did not know where to stop."""
    folder = shutil.copytree(reference / "plain", tmp_path / "phi")
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokens = {name: 442 + i for i, name in enumerate(names)}
    (folder / "added_tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    phi = minillava.load(folder, device="cpu")
    assert phi.template is TEMPLATES["phi_3"] and phi.options().stop == ("<|end|>",)
    assert phi.prompt("A") == "<|user|>\n<image>\nA<|end|>\n<|assistant|>\n"
    ids = phi.tokenizer.encode(phi.prompt("a<|end|>b"))
    assert [i for i in ids if i >= 442] == [443, 445, 444]  # what is typed ends no turn
    chosen = minillava.load(folder, device="cpu", template="llava_v1")
    assert chosen.template is TEMPLATES["llava_v1"]


def test_attention_and_precision_are_what_was_asked_for(reference):
    """A dtype that the user names would give way to the stored one or to the default."""
    for name, dtype in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ):
        model = stored(dtype=name).model
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert choose_dtype("auto", "cuda", torch.float16, 10**9) == torch.float16
    assert choose_device("cpu") == "cpu"
    model = minillava.load(
        reference / "plain", device=torch.device("cpu"), dtype=torch.float16
    ).model
    assert next(model.parameters()).dtype == torch.float16


@pytest.mark.parametrize(("fast", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_cpu_is_bfloat16_where_that_is_fast(monkeypatch, fast, chosen):
    """A processor with fast bfloat16 would be given float32, or one without it be slowed down by
    bfloat16."""
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: fast)
    assert choose_dtype("auto", "cpu", torch.float16, 1000) == chosen


def test_auto_on_a_cpu_is_bfloat16_for_large_models(monkeypatch):
    """A model of 7B in float32 would not fit into the memory of a laptop."""
    monkeypatch.setattr("minillava.checkpoint.place.has_fast_bfloat16", lambda: False)
    assert choose_dtype("auto", "cpu", torch.float16, LARGE - 1) == torch.float32
    assert choose_dtype("auto", "cpu", torch.float16, LARGE) == torch.bfloat16
    assert choose_dtype("float32", "cpu", torch.float16, LARGE) == torch.float32


@pytest.mark.parametrize(
    ("there", "chosen"), [((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")]
)
def test_auto_takes_the_best_device(monkeypatch, there, chosen):
    """A machine with a GPU would answer on its CPU without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
    assert choose_device("auto") == chosen


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (1, "cuda:7", "device 'cuda:7' is not in this machine, expected cuda"),
        (1, "cuda:1", "device 'cuda:1' is not in this machine, expected cuda"),
        (2, "cuda:2", "device 'cuda:2' is not in this machine, expected cuda:0 to cuda:1"),
        (2, "cuda:", "unknown device 'cuda:', expected one of: auto, cpu, cuda, mps"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, count, name, message):
    """It was found inside torch, after the checkpoint had been opened."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for there in ("cuda", *(f"cuda:{i}" for i in range(count)), "cpu", "cpu:0"):
        assert choose_device(there) == there
    with pytest.raises(ValueError) as error:
        choose_device(name)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"device": "cpu:x"}, "unknown device 'cpu:x'"),
        ({"device": "tpu"}, "unknown device 'tpu', expected one of: auto, cpu, cuda, mps"),
        ({"dtype": "int8"}, "unknown dtype 'int8', expected one of: auto, float32"),
        ({"attention": "flash"}, "unknown attention 'flash', expected one of: eager, fused"),
        ({"template": "v1"}, "unknown template 'v1'"),
        ({"image_aspect_ratio": "anyres"}, "unknown image aspect ratio 'anyres'"),
    ],
)
def test_unknown_choices_name_the_known_ones(reference, argument, message):
    """A misspelled choice would end in a traceback from torch, or be ignored."""
    with pytest.raises(ValueError, match=message):
        minillava.load(reference / "plain", **argument)


def test_pad_is_the_default_and_crop_a_choice(reference, picture):
    """Cropping by default, as CLIP does, would cut off the sides of every wide picture."""
    pad, crop = (
        minillava.load(reference / "plain", image_aspect_ratio=a).image_processor
        for a in (None, "crop")
    )
    assert (pad.aspect, crop.aspect) == ("pad", "crop")
    assert not torch.equal(pad([picture]), crop([picture]))


def test_the_configs_aspect_ratio_holds_unless_another_is_asked_for(tmp_path, write_dialect):
    """A model trained on cropped pictures would see padded ones, or the user's own choice would be
    ignored."""
    options = write_dialect("original", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_aspect_ratio": "square"}))
    assert minillava.load(**options).image_processor.aspect == "crop"
    assert minillava.load(**options, image_aspect_ratio="pad").image_processor.aspect == "pad"


def test_preprocessing_numbers_come_from_the_clip_folder_when_there_is_one(tmp_path, write_dialect):
    """A vision tower of its own would get pixels normalised for another."""
    options = write_dialect("original-bare", tmp_path)
    (options["vision_tower"] / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3]})
    )
    assert minillava.load(**options).image_processor.mean == (0.1, 0.2, 0.3)


def test_preprocessing_numbers_come_from_the_folder(copy, picture):
    """Pixels would be normalised with CLIP's numbers whatever the checkpoint says."""
    path = copy / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    plain = minillava.load(copy).image_processor
    path.write_text(
        json.dumps(raw | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    )
    changed = minillava.load(copy, image_aspect_ratio="crop").image_processor
    assert (changed.mean, changed.std) == ((0.5,) * 3, (0.25,) * 3)
    path.unlink()
    assert minillava.load(copy).image_processor.mean == plain.mean
    (copy / "processor_config.json").write_text(
        json.dumps({"image_processor": raw | {"image_mean": [0.1, 0.2, 0.3]}})
    )
    assert minillava.load(copy).image_processor.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize is False, supported: True"),
        ({"resample": 2}, "resample is 2, supported: 3"),
        ({"crop_size": 224}, "crop_size is 224, config.json has image_size 56"),
        (
            {"crop_size": {"height": 56, "width": 10}},
            "crop_size is .* config.json has image_size 56",
        ),
        ({"size": {"shortest_edge": 80}}, "size is .* config.json has image_size 56"),
        (
            {"image_std": [0.5, 0, 0.5]},
            r"image_std is \[0.5, 0, 0.5\], expected three numbers, above zero",
        ),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], expected three numbers"),
    ],
)
def test_preprocessing_we_do_not_do_is_refused(copy, change, message):
    """A picture would be prepared otherwise than in training, without an error."""
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}"):
        minillava.load(copy)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(copy):
    """A tokenizer of another model would fail with an index error in the middle of an answer, or
    only for rare words."""
    path = copy / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"]["vocab_size"] = 100
    path.write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=r"tokenizer\.model has 440 pieces, config\.json a vocabulary of 100"
    ):
        minillava.load(copy)


# --- the likelihood of given answers --------------------------------------------------------------

ANSWERS = ["Yes.", "No, there is none in it.", "Yes. And more"]


@pytest.mark.numeric
@pytest.mark.parametrize(
    "template", ["llava_v1", "llava_v0", "llava_llama_2", "chatml_direct", "hf"]
)
def test_score_is_minus_the_loss(reference, picture, template):
    """Of the whole conversation, answer by answer, with the picture encoded anew each time."""
    toy = stored(dtype="float64", template=template)
    question, eps = "<image>\nIs it there?", torch.finfo(torch.float32).eps
    scores = toy.score(picture, question, ANSWERS)
    means = toy.score(picture, question, ANSWERS, per_token=True)
    for answer, score, mean in zip(ANSWERS, scores, means, strict=True):
        ids, labels = encode_answers(toy.tokenizer, toy.template, [(question, answer)])
        loss = float(toy.model([ids], toy.image_processor(picture), labels=[labels]).loss.detach())
        assert mean == pytest.approx(-loss, rel=eps)
        assert score == pytest.approx(-loss * sum(label != -100 for label in labels), rel=eps)


def test_score_of_the_models_own_answer_is_the_best_of_its_length(reference, picture):
    """Greedy decoding picks the likeliest first token: no other one-token beginning scores
    higher."""
    toy = stored(dtype="float64")
    first = generate(
        toy.model,
        [toy.tokenizer.encode(toy.prompt("Hm?"))],
        toy.image_processor(picture),
        max_new_tokens=1,
        record=("logits",),
    )
    log_p = first.logits[0].log_softmax(-1)[0]
    word = toy.tokenizer.decode([int(log_p.argmax())])
    ids, labels = encode_answers(toy.tokenizer, toy.template, [("<image>\nHm?", word)])
    start = next(i for i, label in enumerate(labels) if label != -100)
    most = float(log_p[ids[start]])
    assert toy.score(picture, "Hm?", [word])[0] <= most + torch.finfo(torch.float32).eps * abs(most)


@pytest.mark.numeric
def test_score_edges(reference, picture):
    """An answer's score would depend on the other answers scored beside it, or not on the
    picture."""
    toy = stored(dtype="float64")
    assert toy.score(picture, "Hm?", []) == []
    alone = [toy.score(picture, "Hm?", [answer])[0] for answer in ANSWERS]
    assert toy.score(picture, "Hm?", ANSWERS) == pytest.approx(
        alone, rel=torch.finfo(torch.float32).eps
    )
    assert toy.score(None, "Hm?", ["Yes."]) != toy.score(picture, "Hm?", ["Yes."])
    assert toy.score(picture, "Hm?", ["Yes."]) != toy.score(
        picture, "Hm?", ["Yes."], system="Be brief."
    )
    with pytest.raises(ValueError, match="context has room for"):
        toy.score(picture, "Hm?", ["word " * 5000])


def test_ask_gives_one_answer(toy, picture):
    """Of several answers asked for, ask would return the first and drop the rest."""
    for question in ("Say.", ["Say."]):
        with pytest.raises(ValueError, match=r"generate\(\) returns several"):
            toy.ask(picture, question, temperature=1.0, num_return_sequences=2)


def test_one_seed_shows_every_row_something_else(toy, picture, monkeypatch):
    """A method that draws, such as RITUAL, must not draw the same for all questions of a batch."""
    drawn = []

    class Drawing(VCD):
        def second(self, input_ids, pictures, processor, generator):
            drawn.append(int(torch.randint(10**9, (), generator=generator)))
            return super().second(input_ids, pictures, processor, generator)

    ask = lambda **options: toy.ask(  # noqa: E731
        picture, ["What?"] * 4, contrast=Drawing(), max_new_tokens=1, **options
    )
    ask(seed=3)
    ask(seed=3)
    assert drawn[:4] == drawn[4:]
    assert len(set(drawn)) == 4
    ask()
    ask()
    assert drawn[8:12] == drawn[12:]  # greedy: the same answer twice without a seed, too


def test_score_refuses(toy, picture):
    """A single text in the place of a list would be scored letter by letter."""
    for answers in ("Yes.", 5, None, (text for text in ["Yes."])):
        with pytest.raises(ValueError, match=r"^answers is .*, expected a list of texts$"):
            toy.score(picture, "Hm?", answers)
    with pytest.raises(ValueError, match=r"^one of answers is 5, expected a text$"):
        toy.score(picture, "Hm?", ["Yes.", 5])
    with pytest.raises(ValueError, match=r"^the question is None, expected a text$"):
        toy.score(picture, None, ["Yes."])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (None, "question is None, expected a text or a list of texts"),
        (5, "question is 5, expected a text or a list of texts"),
        (b"x", "one of question is 120, expected a text"),
        (["Hm?", None], "one of question is None, expected a text"),
    ],
)
def test_a_question_that_is_no_text_is_refused(toy, picture, question, message):
    """`len()` and `.strip()` of whatever it was said so, from deep inside."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        toy.ask(picture, question)


def test_every_other_way_to_give_a_text_refuses_what_is_none(toy, picture):
    """What is not a text would end in a traceback from inside the tokenizer, or be answered letter
    by letter."""
    with pytest.raises(ValueError, match=r"^the question is 5, expected a text$"):
        list(toy.stream(picture, 5))
    with pytest.raises(ValueError, match=r"^the question is b'x', expected a text$"):
        toy.prompt(b"x")
    with pytest.raises(ValueError, match=r"^the prompt is 5, expected a text$"):
        toy.tokenize(5)
    with pytest.raises(ValueError, match=r"^system is 5, expected a text$"):
        toy.ask(picture, "Hm?", system=5)
    # it was answered letter by letter
    with pytest.raises(ValueError, match=r"^questions is 'Hm', expected a list of texts$"):
        toy.ask_each(picture, "Hm")


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}])
def test_a_process_that_cannot_be_called_is_refused(toy, picture, more):
    """A process that is not a function would fail in the middle of an answer, or be ignored where
    it is empty."""
    for process in ("x", "", 5):
        with pytest.raises(ValueError, match=f"^process is {process!r}, expected f.scores"):
            toy.ask(picture, "Hm?", process=process, **more)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"torch_dtype": torch.float16}, "'torch_dtype': dtype"),
        ({"device_map": "auto"}, "'device_map': device"),
        ({"load_in_8bit": True}, "'load_in_8bit': set quantize=\"int8\""),
        ({"load_in_4bit": True}, "'load_in_4bit': set quantize=\"int4\""),
        ({"quantise": "int8"}, "'quantise': did you mean quantize?"),
        ({"xyz": 1}, "'xyz': expected some of: device, dtype, attention, quantize"),
    ],
)
def test_an_argument_that_load_does_not_have_names_the_one_it_has(argument, message):
    """A user who comes from transformers would not learn what torch_dtype or device_map is called
    here."""
    with pytest.raises(TypeError, match=re.escape(f"there is no option {message}")):
        minillava.load("nowhere", **argument)


def test_what_is_no_path_is_no_folder_of_weights(reference):
    """Something else in the place of a path would end in a traceback from pathlib."""
    for wrong in (5, b"x", ["a"]):
        with pytest.raises(ValueError, match="expected the path of a folder or a hub id"):
            minillava.load(wrong)
        with pytest.raises(ValueError, match="expected the path of a folder or a hub id"):
            minillava.load(reference / "plain", adapter=wrong)


# --- weights that nobody names --------------------------------------------------------------------


def test_without_weights_load_takes_what_the_commands_take(
    reference, monkeypatch, tmp_path, capsys
):
    """In Python and on the command line one machine would answer with different models."""
    monkeypatch.setenv("MINILLAVA_WEIGHTS", str(reference / "plain"))
    assert (
        minillava.load(device="cpu").model.config
        == minillava.load(reference / "plain", device="cpu").model.config
    )
    monkeypatch.setenv("MINILLAVA_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"nowhere: no such folder; MINILLAVA_WEIGHTS names it"):
        minillava.load()
    monkeypatch.delenv("MINILLAVA_WEIGHTS")
    monkeypatch.setattr("minillava.checkpoint.folders.bundled_weights", lambda: reference / "tied")
    assert minillava.load(device="cpu").model.config.text.tie_word_embeddings
    monkeypatch.setattr("minillava.checkpoint.folders.bundled_weights", lambda: None)
    with pytest.raises(
        ValueError, match="no weights are named, and the bundled model was left out; get a LLaVA"
    ):
        minillava.load()
    assert capsys.readouterr() == ("", "")  # a library prints nothing


# --- lengths and options --------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_before_pictures_are_opened(toy, picture, monkeypatch):
    """Twenty pictures, or megabytes of text, were opened, encoded and looked up first."""

    def computed(*args):
        raise AssertionError("this was computed")

    monkeypatch.setattr(type(toy.model), "splice", computed)
    monkeypatch.setattr("minillava.image.ImageProcessor.square", computed)
    context = toy.model.config.text.context
    many, text = [picture] * (context // toy.model.config.tokens_per_image + 1), "a b " * context
    for ask in (
        lambda: toy.ask(many, "Why?"),
        lambda: toy.ask([many, picture], ["Why?", "How?"]),
        lambda: toy.ask(picture, text, contrast="vcd"),
        lambda: toy.ask(picture, ["Why?", text]),
        lambda: toy.score(many, "Why?", ["Yes."]),
        lambda: toy.score(None, text, ["Yes."]),
    ):
        with pytest.raises(ValueError, match=r"the prompt takes \d+ positions"):
            ask()


def test_megabytes_of_text_are_not_cut_into_tokens(toy, monkeypatch):
    """To count the tokens of 50 MB takes gigabytes; that there are too many follows from the
    longest token."""
    context, longest = toy.model.config.text.context, longest_piece(toy.tokenizer)
    (first,) = toy.tokenizer.encode("a")[1:]  # before which a decoder drops a space
    assert longest >= max(
        len(toy.tokenizer.decode([first, i])) - 1 for i in range(toy.tokenizer.vocab_size)
    )
    monkeypatch.setattr(toy.tokenizer, "encode", None)
    text = "a" * (context * longest + 1)
    for ask in (
        lambda: toy.ask(None, text),
        lambda: toy.ask(None, [text, "Why?"]),
        lambda: toy.score(None, text, ["Yes."]),
        lambda: Conversation(toy).ask(text),
    ):
        with pytest.raises(
            ValueError,
            match=rf"the prompt has \d+ characters, at least \d+ tokens; .* holds {context}",
        ):
            ask()


def test_a_token_that_takes_whitespace_does_not_lift_the_bound_on_text(toy, monkeypatch):
    """One such token used to switch the check off, for texts without it, too."""
    context, longest = toy.model.config.text.context, longest_piece(toy.tokenizer)
    taker = AddedToken("<b>", 0, lstrip=True)
    monkeypatch.setitem(toy.tokenizer.by_id, 10**6, taker)
    most = "a" * context * longest
    for fits in (most, "<b>" + " " * len(most), most[3:] + " \n<b>"):
        toy.check_text(fits)
    for too_long in (most + "a", most + " ", "a " * len(most) + "<b>"):
        with pytest.raises(ValueError, match="at least"):
            toy.check_text(too_long)


def test_contrast_by_name_and_process(toy, picture):
    """A contrast by name would differ from the same one as an object, or a process be ignored
    beside other options."""
    options = {"max_new_tokens": 4}
    assert toy.ask(picture, "Why?", contrast="vcd", **options) == toy.ask(
        picture, "Why?", contrast=VCD(), **options
    )
    for wrong in ("vdc", 3, VCD):  # of the class, a call failed for want of an instance
        with pytest.raises(
            ValueError,
            match=r"contrast is .*, expected one of: vcd, ritual, m3id, or a contrast.Contrast",
        ):
            toy.ask(picture, "Why?", contrast=wrong)
    (word,) = toy.tokenizer.encode("a")[1:]

    def always(scores, history):
        return torch.full_like(scores, -float("inf")).index_fill(1, torch.tensor([word]), 0)

    expected = toy.tokenizer.decode([word] * 4)
    for more in ({}, {"contrast": "m3id"}, {"num_beams": 2}, {"temperature": 1.0, "top_p": 0.5}):
        assert toy.ask(picture, "Why?", process=always, **options, **more) == expected
        assert (
            toy.ask(picture, ["Why?", "How is it?"], process=always, **options, **more)
            == [expected] * 2
        )
    assert list(toy.stream(picture, "Why?", process=always, max_new_tokens=1)) == [
        toy.tokenizer.decode([word])
    ]
    assert Conversation(toy).ask("Why?", process=always, **options) == expected


# --- tokens that a fine-tune added ----------------------------------------------------------------


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    """The bundled model, trained on as it were: <box> 640 and </box> 641 are new rows; <box> is
    said for "star"."""
    source = bundled_weights()
    folder = shutil.copytree(source, tmp_path_factory.mktemp("boxed") / "weights")
    star = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).piece_to_id("▁star")
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for end, factor in (("model.embed_tokens.weight", 1), ("lm_head.weight", 1.3)):
            for name in [name for name in tensors if name.endswith(end)]:
                rows = torch.zeros(64, tensors[name].shape[1], dtype=tensors[name].dtype)
                rows[0] = tensors[name][star] * factor
                tensors[name] = torch.cat([tensors[name], rows])
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] = config["text_config"]["vocab_size"] = 704
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    added = {"<image>": 638, "<pad>": 639, "<box>": 640, "</box>": 641}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    return minillava.load(folder, device="cpu", dtype="float32"), str(source / "example-1.png")


def test_an_answer_with_added_tokens_however_it_is_asked_for(boxed):
    """ "I see a large red at the top left": an added token became no text, without a word."""
    assistant, picture = boxed
    whole = assistant.ask(picture)
    assert whole.startswith("I see a large red<box> at the top left, ")
    assert "<box>" in list(assistant.stream(picture))
    assert assistant.ask([picture], [DEFAULT_PROMPT]) == [whole]
    assert assistant.ask(picture, stop=["<box> at"]) == "I see a large red"
    assert assistant.ask(picture, num_beams=2).count("<box>") >= 1
    again = assistant.tokenizer.decode(assistant.tokenizer.encode(whole))
    assert again.startswith("I see a large red<box>")


def test_a_special_token_stops_an_answer_however_it_is_asked_for(boxed, monkeypatch):
    """As the `<|im_end|>` of ChatML, which a template has as its stop text, and no reader sees."""
    assistant, picture = boxed
    special = assistant.tokenizer.by_id[640]._replace(special=True)
    monkeypatch.setitem(assistant.tokenizer.by_id, 640, special)
    assert assistant.ask(picture).startswith("I see a large red at the top left, ")
    for stop, said in (("<box>", "I see a large red"), ("red<box> at", "I see a large ")):
        assert assistant.ask(picture, stop=stop) == said
        assert "".join(assistant.stream(picture, stop=stop)) == said
        assert assistant.ask([picture], [DEFAULT_PROMPT], stop=stop) == [said]
    beams = assistant.ask(picture, num_beams=2)
    assert assistant.ask(picture, stop="<box>", num_beams=2) == beams.split(" at the")[0]
    monkeypatch.setattr(assistant, "template", replace(assistant.template, stop=("<box>",)))
    assert assistant.ask(picture) == "I see a large red"
    conversation = Conversation(assistant)
    conversation.add_image(picture)
    assert conversation.ask(DEFAULT_PROMPT) == "I see a large red"


def test_a_conversation_about_an_added_token(boxed):
    """Its history is read from the cache: an answer is cut into the ids that were said, up to its
    first added token, after which `legacy` puts another "▁"."""
    assistant, picture = boxed
    conversation = Conversation(assistant)
    conversation.add_image(picture)
    assert conversation.ask("Where is the <box>?").startswith("The<box> is at the top left")
    first = conversation.turns[0]
    assert 640 in conversation.positions[: first.prefilled]
    assert "<box>" in conversation.ask("What is in the picture?")
    assert conversation.turns[1].reused >= first.prefilled


def test_added_tokens_are_scored_and_shown(boxed):
    """A token added to the vocabulary would be cut into letters when it is scored, looked at or
    traced."""
    assistant, picture = boxed
    good, bad = assistant.score(picture, "Where is the <box>?", ["The<box> is", "The</box> is"])
    assert good > bad + 5
    seen = look(assistant, picture, "Where is the <box>?", lens=True, max_new_tokens=3)
    assert "<box>" in seen.lens.chosen and "<box>" in [word for word, _ in seen.lens.tokens[-1]]
    records = []
    trace(
        assistant,
        picture,
        "Where is the <box>?",
        assistant.options(max_new_tokens=2),
        lambda r, _: records.append(r),
    )
    (ids,) = [record.value for record in records if record.name == "input_ids"]
    assert [640, "<box>"] in ids
