"""minillava against stored numbers of Hugging Face transformers (tools/make_reference.py); runs
without transformers.

The stored numbers were computed by another machine's kernels, so bits cannot be compared here;
test_parity_live.py does that. The measure is the same network in float64: for every tensor, dtype
and attention function,

    max |ours - float64|  <=  2 * max |transformers' - float64|

where transformers ran in the same dtype with its counterpart of that attention function, and for
the logits of the fused function in half precision, where single entries scatter, also

    norm(ours - float64)  <=  1.1 * norm(transformers' - float64).

Token ids are equal.
"""

import functools
import hashlib
from itertools import product

import hf
import pytest
import torch
from bounds import assert_within, network
from paths import REFERENCE
from safetensors.torch import load_file

import minillava
from minillava.generate.generation import generate
from minillava.loop import Options, steps

pytestmark = pytest.mark.numeric

TOYS = ("plain", "grouped", "tied")
COUNTERPART = {"eager": "eager", "fused": "sdpa"}
HALVES_AND_SINGLE = ("float32", "bfloat16", "float16")
NEW_TOKENS = 16


load = functools.partial(minillava.load, device="cpu", dtype="float32", attention="eager")


@functools.cache
def assistant(name: str, dtype: str = "float32", attention: str = "eager"):
    return load(REFERENCE / name, dtype=dtype, attention=attention)


@functools.cache
def facts(name: str) -> dict:
    return hf.read_json(REFERENCE / f"{name}.json")


@functools.cache
def exact(name: str) -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / f"{name}.safetensors")


@functools.cache
def pixels(*names: str) -> torch.Tensor:
    return assistant("plain").image_processor(
        [REFERENCE / "pictures" / f"{name}.png" for name in names]
    )


def one(name: str) -> tuple[list[list[int]], torch.Tensor]:
    return facts(name)["input_ids"], pixels(*facts(name)["pictures"])


def batch(name: str) -> tuple[list[list[int]], torch.Tensor]:
    return facts(name)["batch_input_ids"], pixels(*facts(name)["batch_pictures"])


@torch.no_grad()
def tensors(model, name: str, attention: str) -> dict[str, torch.Tensor]:
    """Ours of every stored tensor, under its stored name."""
    ids, images = one(name)
    _, batch_images = batch(name)
    record = ("hidden_states", "attentions") if attention == "eager" else ("hidden_states",)
    prefill = generate(model, ids, images, max_new_tokens=1, record=record)
    labelled = model(facts(name)["labelled_input_ids"], batch_images, labels=facts(name)["labels"])
    return {
        "vision": model.vision_tower(images),
        "projected": model.encode_images(images),
        **{f"hidden_states.{i}": x for i, x in enumerate(prefill.hidden_states[0])},
        **{
            f"attentions.{i}": x
            for i, x in enumerate(prefill.attentions[0] if prefill.attentions else ())
        },
        "logits": model(ids, images).logits,
        "batch_logits": labelled.logits[:, -4:],
        "loss": labelled.loss,
    }


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    assert x.shape == y.shape
    return (x.double() - y.double()).abs().max().item()


@pytest.mark.parametrize(
    ("name", "dtype", "attention"), product(TOYS, HALVES_AND_SINGLE, COUNTERPART)
)
def test_every_tensor_is_as_close_to_float64_as_transformers(name, dtype, attention):
    """A layer would lose digits that transformers keeps, which shows in no short answer."""
    theirs = facts(name)["errors"][dtype][COUNTERPART[attention]]
    allowed = {key: 2 * error["max"] for key, error in theirs.items()}
    ours = tensors(assistant(name, dtype, attention).model, name, attention)
    assert ours.keys() == allowed.keys()
    # The loss is one number: transformers' may be right by luck. No entry of the logits' error can
    # count more than twice in a cross-entropy, so the logits' bound gives the loss its own.
    allowed["loss"] = 2 * allowed["batch_logits"]
    far = {k: (distance(x, exact(name)[k]), allowed[k]) for k, x in ours.items()}
    assert not {k: pair for k, pair in far.items() if not pair[0] <= pair[1]}, "(found, allowed)"
    if attention == "fused" and dtype != "float32":
        assert (
            hf.error(ours["logits"], exact(name)["logits"])["norm"]
            <= 1.1 * theirs["logits"]["norm"]
        )


@pytest.mark.parametrize(("name", "attention"), product(TOYS, COUNTERPART))
def test_greedy_ids(name, attention):
    """A greedy answer, alone or in a batch, would differ from the one that transformers gave."""
    model = assistant(name, attention=attention).model
    assert generate(model, *one(name), max_new_tokens=NEW_TOKENS).sequences.tolist() == [
        facts(name)["greedy"]
    ]
    answer = generate(model, *batch(name), max_new_tokens=NEW_TOKENS)
    assert answer.sequences.tolist() == facts(name)["batch_greedy"]
    assert answer.finish_reason == [
        "stop" if 2 in row else "length" for row in facts(name)["batch_greedy"]
    ]


@pytest.fixture
def same_random_numbers(reference):
    """Samples are comparable where torch draws the same random numbers, which differs between its
    builds."""
    torch.manual_seed(0)
    if (
        torch.empty(8).exponential_().tolist()
        != hf.read_json(reference / "made-with.json")["exponentials"]
    ):
        pytest.skip(
            "this build of torch draws other random numbers than the one that made the reference"
        )


@pytest.mark.parametrize(("name", "attention"), product(TOYS, COUNTERPART))
@pytest.mark.usefixtures("same_random_numbers")
def test_sampled_ids(name, attention):
    """A seed would draw another answer than it drew in transformers."""
    model = assistant(name, attention=attention).model
    for sample in facts(name)["sampled"]:
        answer = generate(model, *one(name), max_new_tokens=NEW_TOKENS, **sample["settings"])
        assert answer.sequences.tolist() == [sample["ids"]], sample["settings"]
    sample = facts(name)["batch_sampled"]
    answer = generate(model, *batch(name), max_new_tokens=NEW_TOKENS, **sample["settings"])
    assert answer.sequences.tolist() == sample["ids"]


def test_prompt_ids():
    """The prompt would be split into other tokens than those transformers reads."""
    assert (
        assistant("plain").tokenizer.encode(facts("plain")["prompt"])
        == facts("plain")["input_ids"][0]
    )


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (REFERENCE / "pictures").glob("*.png"))
)
def test_pixels_are_bit_equal(name, aspect):
    """A picture would be resized or normalised to other numbers than those stored."""
    processor = load(REFERENCE / "plain", image_aspect_ratio=aspect).image_processor
    (ours,) = processor([REFERENCE / "pictures" / f"{name}.png"])
    mean, std = (
        torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (processor.mean, processor.std)
    )
    levels = ((ours.double() * std + mean) * 255).round()
    off = (
        levels - load_file(REFERENCE / "pictures.safetensors")[f"{name}.{aspect}"].double()
    ).abs()
    assert off.max() == 0, f"{(off > 0).sum()} grey levels differ, the worst by {off.max():.0f}"
    digest = hashlib.sha256(ours.contiguous().numpy().tobytes()).hexdigest()
    assert digest == hf.read_json(REFERENCE / "pictures.json")[f"{name}.{aspect}"], (
        "same grey levels, other rounding"
    )


@pytest.mark.parametrize("written", [(1, "float32"), (3, "float32"), (1, "float16")], ids=str)
@pytest.mark.parametrize("dialect", hf.DIALECTS)
def test_every_dialect_is_the_same_model(dialect, written, write_dialect, tmp_path):
    """A checkpoint in one of the layouts would load with weights missing, swapped or converted."""
    shards, dtype = written
    plain = assistant("plain").model
    if dtype != "float32":
        plain = load(**write_dialect("hub", tmp_path / "hub", dtype=dtype)).model
    model = load(**write_dialect(dialect, tmp_path / dialect, shards, dtype)).model
    expected = plain.state_dict()
    assert model.state_dict().keys() == expected.keys()
    # The original's vocabulary is the tokenizer's; the hub's conversion appended rows that are no
    # words.
    rows = model.config.text.vocab_size
    assert rows == (440 if dialect.startswith("original") else 448)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, expected[key][: len(weight)]), key
    # out of the mapped file: where a tensor starts in it can decide a product's last bit
    for m in (model, plain):
        m.load_state_dict(
            {key: weight.clone() for key, weight in m.state_dict().items()}, assign=True
        )
    # The last hidden state, because a head with fewer rows may round each of them differently.
    states = [
        generate(m, *one("plain"), max_new_tokens=1, record=["hidden_states"]).hidden_states[0]
        for m in (model, plain)
    ]
    assert torch.equal(states[0][-1], states[1][-1])
    if not dialect.startswith("original"):
        with torch.no_grad():
            assert torch.equal(model(*one("plain")).logits, plain(*one("plain")).logits)


@pytest.mark.parametrize("attention", COUNTERPART)
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_without(name, attention):
    """Logits of each step against one pass over prompt and answer, in float64: as near as float32
    allows in such a network, on any processor. Another pass in float32 would be no measure, it may
    be right by luck."""
    ids, images = one(name)
    model = assistant(name, attention=attention).model
    answer = generate(model, ids, images, max_new_tokens=NEW_TOKENS, record=["logits"])
    whole = [ids[0] + answer.sequences[0, :-1].tolist()]
    new = answer.sequences.shape[1]
    exactly = assistant(name, "float64").model
    allowed = network(exactly, lambda: {"logits": exactly(whole, images).logits[:, -new:]})[
        "logits"
    ]
    assert_within(torch.stack(answer.logits, dim=1), allowed)
    assert_within(model(whole, images).logits[:, -new:], allowed)


@pytest.mark.parametrize("attention", COUNTERPART)
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_a_batch_is_its_rows_alone(name, attention):
    """Rows with no, one and two pictures, padded on the left; by what float32 allows the row
    alone."""
    ids, images = batch(name)
    model, exactly = assistant(name, attention=attention).model, assistant(name, "float64").model
    together = generate(model, ids, images, max_new_tokens=NEW_TOKENS, record=["logits"])
    logits, first = model(ids, images).logits, 0
    for i, row in enumerate(ids):
        mine = images[first : first + row.count(hf.IMAGE)]
        first += len(mine)
        allowed = network(
            exactly, lambda row=row, mine=mine: {"logits": exactly([row], mine).logits[0]}
        )["logits"]
        assert_within(logits[i, -len(allowed[0]) :], allowed)
        assert_within(model([row], mine).logits[0], allowed)
        answer = generate(model, [row], mine, max_new_tokens=NEW_TOKENS)
        n = answer.sequences.shape[1]
        assert answer.sequences[0].tolist() == together.sequences[i, :n].tolist()
        assert (together.sequences[i, n:] == model.config.pad_token_id).all()


def test_two_generations_can_take_turns_on_one_model():
    """Two answers generated at once would share a cache or a generator and change each other."""
    model = assistant("plain", attention="fused").model
    (ids, images), (batch_ids, batch_images) = one("plain"), batch("plain")
    asked = [
        (ids, images, Options(NEW_TOKENS, temperature=1.0, seed=7)),
        (batch_ids, batch_images, Options(NEW_TOKENS, temperature=1.0, seed=8)),
    ]
    with torch.no_grad():
        turns = [
            steps(model, model.splice(rows, pictures), options) for rows, pictures, options in asked
        ]
    taken = list(zip(*turns, strict=True))
    for i, (rows, pictures, options) in enumerate(asked):
        alone = generate(
            model,
            rows,
            pictures,
            max_new_tokens=NEW_TOKENS,
            temperature=options.temperature,
            seed=options.seed,
        )
        assert torch.equal(
            torch.stack([step[i].token_ids for step in taken], dim=1), alone.sequences
        )
