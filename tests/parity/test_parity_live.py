"""minillava against Hugging Face transformers, both in this process: the same kernels, so `eager`
agrees bit for bit.

Networks, prompts and pictures are drawn by a seed; MINILLAVA_PARITY_SEED=<anything> draws others.
A failure prints it.
"""

import functools
import os
import random
import runpy
import shutil
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import hf
import numpy as np
import pytest
import torch
from bounds import assert_same_in_float64, network
from drawn import KINDS, draw_config, draw_rows
from paths import REFERENCE, ROOT
from PIL import Image

import minillava
from minillava.attention import fused
from minillava.generate.generation import generate
from minillava.image import ImageProcessor
from minillava.inspection.doctor import attending
from minillava.labels import encode_answers
from minillava.tokenizer import Tokenizer

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="live parity needs transformers 5"
)

pytestmark = [pytest.mark.numeric, pytest.mark.parity]

SEED = os.environ.get("MINILLAVA_PARITY_SEED", "1")
DTYPES = ("float32", "bfloat16", "float16")
STEPS = 7

load = functools.partial(minillava.load, device="cpu")


@pytest.fixture(autouse=True)
def print_seed():
    print(f"MINILLAVA_PARITY_SEED={SEED}")


@pytest.fixture
def short_lived(tmp_path):
    """A folder for large files: pytest would keep them for three more runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


# --- what is drawn --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """`drawn(kind)`: a checkpoint folder as on the hub, one prompt with a picture, a batch with
    none, one and two."""

    @functools.cache
    def draw(kind: str) -> SimpleNamespace:
        choose = random.Random(f"{SEED} {kind}")
        config = draw_config(kind, choose)
        state = hf.random_state(config, choose.randrange(10**9))
        folder = tmp_path_factory.mktemp(kind)
        hf.write_checkpoint(
            folder, config, state, tokenizer=REFERENCE / "plain" / "tokenizer.model"
        )
        size, words = config["vision_config"]["image_size"], config["image_token_index"]
        pixels = torch.randn(
            3, 3, size, size, generator=torch.Generator().manual_seed(choose.randrange(10**9))
        )
        one, batch = draw_rows([1], words, choose), draw_rows([0, 1, 2], words, choose)
        return SimpleNamespace(
            folder=folder, prompts={"one": (one, pixels[:1]), "batch": (batch, pixels)}
        )

    return draw


# --- comparing ------------------------------------------------------------------------------------


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    # both minus infinity: a token that was filtered out
    off = (ours.double() - theirs.double()).abs().nan_to_num(0)
    assert torch.equal(ours, theirs), (
        f"{what}: {(ours != theirs).sum()} of {ours.numel()} differ, by up to {off.max():.3g}"
    )


def assert_same_where_real(ours, theirs, mask: torch.Tensor, what: str) -> None:
    """[B, T, ...] or, for attention weights, [B, H, T, S]: padded positions hold nothing that
    anyone reads."""
    if what.startswith("attentions"):
        ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
    assert_same(ours[mask], theirs[mask], what)


@torch.no_grad()
def ours_of(model, rows, pixels) -> dict[str, torch.Tensor]:
    """Our tensors under the names of hf.forward, from one pass without a cache."""
    eager = model.language_model.attend.__name__ == "eager"
    prompt = model.splice(rows, pixels)
    out = model.language_model(
        prompt.embeds, prompt.padding_mask, hidden_states=True, attentions=eager
    )
    assert_same(
        model(rows, pixels).logits,
        out.logits,
        "logits of the whole model and of its language model",
    )
    return {
        "vision": model.vision_tower(pixels),
        "projected": model.encode_images(pixels),
        **{f"hidden_states.{i}": x for i, x in enumerate(out.hidden_states)},
        **{f"attentions.{i}": x for i, x in enumerate(out.attentions or ())},
        "logits": out.logits,
    }


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype", "prompt"), product(KINDS, DTYPES, ["one", "batch"]))
def test_eager_forward_is_bit_identical(drawn, kind, dtype, prompt):
    """Eager would compute in another order than transformers and differ in the last bit
    somewhere."""
    rows, pixels = drawn(kind).prompts[prompt]
    theirs = hf.forward(hf.load(drawn(kind).folder, dtype), rows, pixels)
    ours = ours_of(load(drawn(kind).folder, dtype=dtype, attention="eager").model, rows, pixels)
    mask = theirs.pop("mask")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name in ("vision", "projected"):
            assert_same(ours[name], theirs[name], name)
        else:
            assert_same_where_real(ours[name], theirs[name], mask, name)


@pytest.mark.parametrize("kind", KINDS)
def test_our_float64_is_the_float64_network(drawn, kind):
    """Bit for bit, although transformers has to be patched for it: nothing of ours falls back to
    float32 on the way."""
    rows, pixels = drawn(kind).prompts["one"]
    with hf.float64():
        theirs = hf.forward(hf.load(drawn(kind).folder, "float64"), rows, pixels)
    ours = ours_of(load(drawn(kind).folder, dtype="float64", attention="eager").model, rows, pixels)
    for name in ours:
        assert_same(ours[name], theirs[name], name)


@pytest.mark.parametrize(("kind", "dtype", "prompt"), product(KINDS, DTYPES, ["one", "batch"]))
def test_eager_decoding_is_bit_identical(drawn, kind, dtype, prompt):
    """Every recorded tensor of the prefill and of each cached step, and the ids they lead to."""
    rows, pixels = drawn(kind).prompts[prompt]
    model = hf.load(drawn(kind).folder, dtype)
    theirs = hf.generate(model, rows, pixels, max_new_tokens=STEPS)
    record = ("scores", "logits", "hidden_states", "attentions")
    mine = load(drawn(kind).folder, dtype=dtype, attention="eager").model
    ours = generate(mine, rows, pixels, max_new_tokens=STEPS, record=record)
    assert ours.sequences.tolist() == theirs.new.tolist()
    for step in range(ours.sequences.shape[1]):
        for name in ("scores", "logits"):
            assert_same(
                getattr(ours, name)[step], getattr(theirs, name)[step], f"{name} of step {step}"
            )
        mask = hf.inputs(model, rows)["attention_mask"].bool()
        mask = mask if step == 0 else torch.ones(len(rows), 1, dtype=torch.bool)
        for name in ("hidden_states", "attentions"):
            layers = zip(getattr(ours, name)[step], getattr(theirs, name)[step], strict=True)
            for i, pair in enumerate(layers):
                assert_same_where_real(*pair, mask, f"{name}.{i} of step {step}")


@pytest.mark.parametrize(("kind", "dtype"), product(KINDS, DTYPES))
def test_fused_is_as_close_to_float64_as_sdpa(drawn, kind, dtype):
    """float32: no tensor's largest error is more than twice theirs. Half precision: the logits'
    error is no more than a tenth longer than theirs. About attention alone: the products of
    fast/linear.py, whose rounding makes the logits of one draw better or worse by more than that, are
    judged one by one in test_linear.py."""
    rows, pixels = drawn(kind).prompts["one"]
    with hf.float64():
        exact = hf.forward(hf.load(drawn(kind).folder, "float64"), rows, pixels)
    theirs = hf.forward(hf.load(drawn(kind).folder, dtype, "sdpa"), rows, pixels)
    model = load(drawn(kind).folder, dtype=dtype, attention="eager").model
    with attending(model, fused):
        ours = ours_of(model, rows, pixels)
    found = {
        name: (hf.error(x, exact[name]), hf.error(theirs[name], exact[name]))
        for name, x in ours.items()
    }
    if dtype == "float32":
        assert not {
            name: pair for name, pair in found.items() if not pair[0]["max"] <= 2 * pair[1]["max"]
        }
    else:
        mine, other = found["logits"]
        assert mine["norm"] <= 1.1 * other["norm"]


SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 1.4, "min_p": 0.05},
    {"temperature": 1.3, "typical_p": 0.5},
    {"temperature": 0.8, "top_k": 9, "typical_p": 0.9},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("prompt", ["one", "batch"])
@pytest.mark.parametrize("settings", SAMPLING, ids=lambda settings: " ".join(settings))
def test_samples_are_the_same(drawn, settings, prompt):
    """Filters in another order than in transformers would draw other tokens for the same seed."""
    choose = random.Random(f"{SEED} {settings}")
    kind, seed = choose.choice(KINDS), choose.randrange(2**32)
    rows, pixels = drawn(kind).prompts[prompt]
    options = {**settings, "seed": seed, "max_new_tokens": 12}
    theirs = hf.generate(hf.load(drawn(kind).folder), rows, pixels, **options)
    mine = load(drawn(kind).folder, dtype="float32", attention="eager").model
    ours = generate(mine, rows, pixels, **options, record=["scores"])
    assert ours.sequences.tolist() == theirs.new.tolist()
    for i, scores in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        assert_same(*scores, f"scores of step {i}")


@pytest.mark.parametrize("prompt", ["one", "batch"])
@pytest.mark.parametrize("penalty", [1.4, 0.8])
def test_repetition_penalty_gives_the_same_scores(drawn, penalty, prompt):
    """A penalty that counts padding, or not the prompt, gives other answers than transformers."""
    rows, pixels = drawn("plain").prompts[prompt]
    options = {"repetition_penalty": penalty, "max_new_tokens": 12}
    theirs = hf.generate(hf.load(drawn("plain").folder), rows, pixels, **options)
    mine = load(drawn("plain").folder, dtype="float32", attention="eager").model
    ours = generate(mine, rows, pixels, **options, record=["scores", "logits"])
    assert ours.sequences.tolist() == theirs.new.tolist()
    for i, scores in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        assert_same(*scores, f"scores of step {i}")
    assert not torch.equal(ours.scores[0], ours.logits[0])


@pytest.mark.parametrize("prompt", ["one", "batch"])
@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        # below 1 it makes the answer repeat itself
        {"no_repeat_ngram_size": 2, "repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 0.6},
        {"min_new_tokens": 5},
        {"min_new_tokens": 4, "temperature": 1.3, "typical_p": 0.6, "no_repeat_ngram_size": 2},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_is_barred_is_the_same(drawn, settings, prompt):
    """The prompts end in what has to be barred; so do ids of the answer, taken as its end
    tokens."""
    choose = random.Random(f"{SEED} {settings}")
    kind, seed = choose.choice(KINDS), choose.randrange(2**32)
    rows, pixels = drawn(kind).prompts[prompt]
    rows = [[*row, 5, 6, 7, 5, 6] for row in rows]
    model, mine = (
        hf.load(drawn(kind).folder),
        load(drawn(kind).folder, dtype="float32", attention="eager").model,
    )
    options = {**settings, "seed": seed, "max_new_tokens": 10}
    free = generate(mine, rows, pixels, **options).sequences
    eos = (2, *free[:, 3].tolist()) if "min_new_tokens" in settings else (2,)
    mine.config = replace(mine.config, eos_token_ids=eos)
    theirs = hf.generate(model, rows, pixels, eos=eos, **options)
    ours = generate(mine, rows, pixels, **options, record=["scores"])
    assert ours.sequences.tolist() == theirs.new.tolist()
    going_on = torch.ones(len(rows), dtype=torch.bool)
    for i, (our_scores, their_scores) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        # transformers counts the padding on the left as ids that must not come again; nobody wants
        # to say it anyway.
        their_scores[:, mine.config.pad_token_id] = our_scores[:, mine.config.pad_token_id]
        assert_same(our_scores[going_on], their_scores[going_on], f"scores of step {i}")
        going_on &= ~torch.isin(ours.sequences[:, i], torch.tensor(eos))
    assert torch.isinf(
        ours.scores[0][:, 7 if "no_repeat_ngram_size" in settings else eos[-1]]
    ).all()


@pytest.mark.parametrize("prompt", ["one", "batch"])
def test_several_samples_are_the_same(drawn, prompt):
    """Several samples would be drawn in another order than in transformers, or all be alike."""
    choose = random.Random(f"{SEED} {prompt}")
    kind, seed = choose.choice(KINDS), choose.randrange(2**32)
    rows, pixels = drawn(kind).prompts[prompt]
    options = {"temperature": 1.2, "num_return_sequences": 3, "seed": seed, "max_new_tokens": 10}
    theirs = hf.generate(hf.load(drawn(kind).folder), rows, pixels, **options)
    ours = generate(
        load(drawn(kind).folder, dtype="float32", attention="eager").model, rows, pixels, **options
    )
    assert ours.sequences.tolist() == theirs.new.tolist()
    assert len({tuple(row) for row in ours.sequences.tolist()}) > len(rows)


def own_sampling(scores, history):
    """What is neither linear nor blind to what was said: its place among penalties, temperature and
    filters shows."""
    best = scores.amax(-1, keepdim=True)
    scores = scores.masked_fill(scores < best - 1.5 * scores.std(-1, keepdim=True), -float("inf"))
    following = (history[:, -1:] + 1) % scores.shape[-1]
    return scores.scatter_add(1, following, torch.full_like(scores[:, :1], 0.5))


@pytest.mark.parametrize("prompt", ["one", "batch"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_k": 5, "repetition_penalty": 0.8},
        {"temperature": 1.3, "top_p": 0.8, "num_return_sequences": 2},
        {"num_beams": 3, "repetition_penalty": 1.2},
        {"num_beams": 2, "temperature": 1.4},
    ],
    ids=lambda settings: " ".join(settings) or "greedy",
)
def test_sampling_of_ones_own_stands_where_a_logits_processor_does(drawn, both, settings, prompt):
    """A `process` would run at another place than in transformers, and the same code answer
    otherwise."""
    skip_drawn_beams(settings)
    choose = random.Random(f"{SEED} {settings} {prompt}")
    kind, seed = choose.choice(KINDS), choose.randrange(2**32)
    rows, pixels = drawn(kind).prompts[prompt]
    model, mine, _ = both(kind)
    options = {**settings, "seed": seed, "max_new_tokens": 10}
    theirs = hf.generate(model, rows, pixels, process=own_sampling, **options)
    ours = generate(mine, rows, pixels, process=own_sampling, **options)
    assert ours.sequences.tolist() == theirs.new.tolist()


def skip_drawn_beams(settings: dict) -> None:
    if {"num_beams", "temperature"} <= settings.keys() and not transformers.__version__.startswith(
        "5.23."
    ):
        pytest.skip(
            "from 5.24 on, transformers sorts the continuations that it has drawn; ours stay as "
            "drawn"
        )


BEAMS = [
    {
        "num_beams": beams,
        "num_return_sequences": returned,
        "early_stopping": early,
        "length_penalty": penalty,
    }
    for (beams, returned), early, penalty in product(
        [(2, 1), (4, 3)], [False, True, "never"], [-1.5, 0.0, 1.0, 2.5]
    )
] + [
    {
        "num_beams": 3,
        "num_return_sequences": 3,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
    },
    {"num_beams": 3, "num_return_sequences": 3, "min_new_tokens": 6},
    {"num_beams": 3, "num_return_sequences": 2, "temperature": 1.4},
    {
        "num_beams": 2,
        "num_return_sequences": 2,
        "temperature": 1.2,
        "top_k": 2,
        "top_p": 0.1,
        "length_penalty": 0.5,
    },
    {"num_beams": 3, "temperature": 1.2, "min_p": 0.3, "early_stopping": True},
    {"num_beams": 3, "temperature": 1.2, "typical_p": 0.2, "early_stopping": "never"},
]


@pytest.fixture(scope="module")
def both(drawn):
    """`both(kind)`: transformers' model, ours, and how far float32 may be off in a logit of such a
    network."""

    @functools.cache
    def both(kind: str):
        mine, exactly = (
            load(drawn(kind).folder, dtype=d, attention="eager").model
            for d in ("float32", "float64")
        )
        rows, pixels = drawn(kind).prompts["batch"]
        _, allowed = network(exactly, lambda: {"logits": exactly(rows, pixels).logits})["logits"]
        return hf.load(drawn(kind).folder), mine, float(allowed.max())

    return both


@pytest.mark.parametrize(
    "settings", BEAMS, ids=lambda settings: " ".join(str(value) for value in settings.values())
)
def test_beams_are_the_same(drawn, both, settings):
    """Ids, ranking scores and the scores that each token of an answer was chosen by. The end tokens
    are such that answers end at different lengths."""
    skip_drawn_beams(settings)
    choose = random.Random(f"{SEED} {settings}")
    for prompt in ("one", "batch"):
        kind, seed = choose.choice(KINDS), choose.randrange(2**32)
        rows, pixels = drawn(kind).prompts[prompt]
        model, mine, allowed = both(kind)
        options = {**settings, "seed": seed, "max_new_tokens": 12}
        likely = (
            generate(mine, rows, pixels, max_new_tokens=8, temperature=1.0, seed=seed)
            .sequences.unique()
            .tolist()
        )
        eos = (2, *choose.sample(likely, min(len(likely), choose.choice([0, 2, len(likely) // 2]))))
        original, mine.config = mine.config, replace(mine.config, eos_token_ids=eos)
        theirs = hf.generate(model, rows, pixels, eos=eos, **options)
        ours = generate(mine, rows, pixels, **options, record=["scores", "logits"])
        mine.config = original
        assert ours.sequences.tolist() == theirs.new.tolist()
        # transformers reads the prompt once per beam, in a larger batch, whose products round
        # otherwise: both are off. A score is a logit less the logarithm of all exponentials, off by
        # as much again, times the penalty; and an answer's is the sum of its tokens', divided by
        # length ** penalty.
        logit = 2 * allowed
        score = 2 * logit * settings.get("repetition_penalty", 1.0)
        answer = 12 * score * 12 ** max(0.0, -settings.get("length_penalty", 1.0))
        torch.testing.assert_close(
            ours.sequences_scores, theirs.sequences_scores, rtol=0, atol=answer
        )
        for i, followed in enumerate(theirs.beam_indices.T):
            real = followed >= 0
            for name, off in (("scores", score), ("logits", logit)):
                expected = getattr(theirs, name)[i][followed.clamp(min=0)]
                torch.testing.assert_close(
                    getattr(ours, name)[i][real], expected[real], rtol=0, atol=off
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_bit_identical(drawn, kind, dtype):
    """Also where a picture carries a label: it is never predicted."""
    rows, pixels = drawn(kind).prompts["batch"]
    labels = [
        [hf.IGNORED if at % 3 == 0 else max(i, 5) for at, i in enumerate(row)] for row in rows
    ]
    theirs = hf.forward(hf.load(drawn(kind).folder, dtype), rows, pixels, labels)["loss"]
    with torch.no_grad():
        mine = load(drawn(kind).folder, dtype=dtype, attention="eager").model
        ours = mine(rows, pixels, labels=labels).loss
    assert_same(ours, theirs, "loss")


def test_scores_of_answers_are_their_loss(drawn):
    """`score` reads the prompt once for all answers; transformers takes the loss of each whole
    conversation."""
    assistant, theirs = (
        load(drawn("plain").folder, dtype="float64"),
        hf.load(drawn("plain").folder, "float64"),
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    answers, question = ["Yes.", "No, there is nothing of the kind."], "<image>\nIs there a cat?"
    found = assistant.score(picture, question, answers, per_token=True)
    for answer, mean in zip(answers, found, strict=True):
        ids, labels = encode_answers(assistant.tokenizer, assistant.template, [(question, answer)])
        with hf.float64():
            loss = hf.forward(theirs, [ids], assistant.image_processor(picture), [labels])["loss"]
        assert_same_in_float64(torch.tensor(mean).double(), -loss, answer)


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pixels_are_bit_equal(mode, aspect):
    """A picture with transparency, in grey or of an odd size would reach the model as other
    pixels."""
    choose = random.Random(f"{SEED} {mode} {aspect}")
    for _ in range(4):
        width, height, size = (
            choose.randrange(4, 300),
            choose.randrange(4, 300),
            choose.randrange(14, 340),
        )
        noise = np.random.default_rng(choose.randrange(10**9)).integers(
            0, 256, (height, width, 4), dtype=np.uint8
        )
        picture = Image.frombytes(
            "CMYK" if mode == "CMYK" else "RGBA", (width, height), noise.tobytes()
        )
        picture = (
            picture.convert(mode)
            if mode in ("RGBA", "LA", "CMYK")
            else picture.convert("RGB").convert(mode)
        )
        (theirs,) = hf.pixel_values([picture], size, pad=aspect == "pad")
        (ours,) = ImageProcessor(size, aspect)([picture])
        assert_same(ours, theirs, f"{mode} {width}x{height} to {size}")


WORDS = [
    "USER:",
    "ASSISTANT:",
    "What",
    "is",
    "in",
    "the",
    "picture?",
    "don't",
    "3.14",
    "2024",
    "héllo",
    "日本語",
    "😀",
    "a\tb",
]


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_the_same(llama_tokenizer, tmp_path, legacy):
    """transformers 5 rebuilds the merges of a tokenizer.model and takes runs of spaces for other
    pieces than SentencePiece does, so there are none here. After a picture it behaves like LLaVA
    only when legacy."""
    from transformers import LlamaTokenizer

    shutil.copy(llama_tokenizer, tmp_path / "tokenizer.model")
    hf.write_json(
        {**hf.tokenizer_config(32000, original=False), "legacy": legacy},
        tmp_path / "tokenizer_config.json",
    )
    theirs, ours = LlamaTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path / "tokenizer.model")
    choose = random.Random(f"{SEED} {legacy}")
    specials = ["<image>\n", "</s>"] if legacy else ["</s>"]
    for _ in range(200):
        words = [choose.choice(WORDS) for _ in range(choose.randrange(1, 12))]
        text = words[0] + "".join(
            choose.choice([" ", " ", "\n", ", "]) + word for word in words[1:]
        )
        at = choose.randrange(len(text))
        if text[at] != " ":
            text = text[:at] + choose.choice(specials) + text[at:]
        ids = [32000 if i == hf.IMAGE else i for i in ours.encode(text)]
        assert ids == theirs(text).input_ids, text
        words_only = [i for i in ids if i != 32000]
        assert ours.decode(words_only) == theirs.decode(words_only, skip_special_tokens=True), text


@pytest.mark.parametrize("dialect", ["modules", "original-bare"])
def test_the_tool_writes_checkpoints_of_any_dialect(dialect, tmp_path, monkeypatch):
    """The tool would write a folder that `load` cannot read, or with another size of picture than
    asked."""
    arguments = [
        "--checkpoint",
        str(tmp_path),
        "--dialect",
        dialect,
        "--dtype",
        "float16",
        "--image-size",
        "42",
    ]
    monkeypatch.setattr("sys.argv", ["make_reference.py", *arguments])
    tool = ROOT / "tools" / "make_reference.py"
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert not ended.value.code
    tower = tmp_path / hf.CLIP_FOLDER if dialect in hf.TOWERLESS else None
    assistant = load(tmp_path, dtype="float32", vision_tower=tower)
    assert assistant.image_processor([Image.new("RGB", (50, 60))]).shape == (1, 3, 42, 42)
    assert len(assistant.ask(Image.new("RGB", (50, 60)), "What is it?", max_new_tokens=3)) > 0


def test_true_widths_are_bit_identical(short_lived):
    """The widths of LLaVA-1.5-7B and CLIP-L/336, where other matrix kernels run, with few layers of
    each."""
    config = hf.hub_config(**hf.SIZES["wide"], pieces=440)
    choose = random.Random(f"{SEED} wide")
    state = hf.random_state(config, choose.randrange(10**9), dtype="bfloat16")
    tokenizer = REFERENCE / "plain" / "tokenizer.model"
    hf.write_checkpoint(short_lived, config, state, dtype="bfloat16", tokenizer=tokenizer)
    del state
    (row,) = draw_rows([1], 440, choose)
    pixels = torch.randn(
        1, 3, 336, 336, generator=torch.Generator().manual_seed(choose.randrange(10**9))
    )
    model = hf.load(short_lived, "bfloat16")
    theirs = hf.generate(model, [row], pixels, max_new_tokens=3)
    features = hf.vision(model, pixels)
    del model
    mine = load(short_lived, dtype="bfloat16", attention="eager").model
    ours = generate(
        mine, [row], pixels, max_new_tokens=3, record=("logits", "hidden_states", "attentions")
    )
    with torch.no_grad():
        assert_same(mine.vision_tower(pixels), features["vision"], "vision")
        assert_same(mine.encode_images(pixels), features["projected"], "projected")
    assert ours.sequences.tolist() == theirs.new.tolist()
    for step, (our_logits, their_logits) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert_same(our_logits, their_logits, f"logits of step {step}")
        for name in ("hidden_states", "attentions"):
            layers = zip(getattr(ours, name)[step], getattr(theirs, name)[step], strict=True)
            for i, pair in enumerate(layers):
                assert_same(*pair, f"{name}.{i} of step {step}")


# --- photographs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described_photos(photos, llama_tokenizer, tmp_path_factory):
    """A random network 512 wide with Llama's tokenizer, and what transformers answers to both
    photographs."""
    config = hf.hub_config(**hf.SIZES["512"], pieces=32000)
    state = hf.random_state(config, seed=1, dtype="float16")
    folder = hf.write_checkpoint(
        tmp_path_factory.mktemp("hub"), config, state, dtype="float16", tokenizer=llama_tokenizer
    )
    model = hf.load(folder, "float32", "sdpa")
    assistant = load(folder, dtype="float32")
    ids = assistant.tokenizer.encode(assistant.prompt("Please describe this image in detail."))
    pixels = hf.pixel_values([Image.open(photo) for photo in photos], 336, pad=True)
    answers = hf.generate(
        model, [ids] * len(photos), pixels, max_new_tokens=12, record=False
    ).new.tolist()
    yield SimpleNamespace(config=config, state=state, ids=ids, answers=answers)
    shutil.rmtree(folder)


@pytest.mark.parametrize("dialect", hf.DIALECTS)
def test_photographs_get_the_same_answers(
    described_photos, photos, llama_tokenizer, short_lived, dialect
):
    """From the files to the ids, by default settings in float32, out of every kind of
    checkpoint."""
    known = described_photos
    hf.write_checkpoint(
        short_lived,
        known.config,
        known.state,
        dialect=dialect,
        dtype="float16",
        tokenizer=llama_tokenizer,
    )
    tower = short_lived / hf.CLIP_FOLDER if dialect in hf.TOWERLESS else None
    assistant = load(short_lived, dtype="float32", vision_tower=tower)
    ids = assistant.tokenizer.encode(assistant.prompt("Please describe this image in detail."))
    assert ids == known.ids
    pixels = assistant.image_processor(photos)
    assert (
        generate(assistant.model, [ids] * len(photos), pixels, max_new_tokens=12).sequences.tolist()
        == known.answers
    )
    assert len({tuple(answer) for answer in known.answers}) == len(photos)
