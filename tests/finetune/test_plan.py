"""The plan: bytes that are predicted from sizes alone are those of a run."""

from dataclasses import replace

import pytest
import torch
from paths import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minillava
from minillava.attention import ATTENTION
from minillava.checkpoint.folders import Folders
from minillava.config import CLIP_LARGE_336, IGNORE_INDEX, LlavaConfig, TextConfig
from minillava.finetune.learning import make_optimiser, prepare
from minillava.finetune.loop import arithmetic, collate, summed_loss
from minillava.finetune.plan import (
    Kept,
    checkpoints,
    estimate_seconds,
    longest,
    make_plan,
    told,
    told_time,
)
from minillava.finetune.recipe import Recipe
from minillava.finetune.rows import Example, Row
from minillava.finetune.start import open_model

PICTURE = ROOT / "weights" / "shapes" / "example-1.png"
SMALL = Recipe(rank=4, alpha=8, batch=3, accumulate=1, dtype="float32", template="llava_v1",
               attention="eager")  # fmt: skip
# of 7 billion parameters
WIDE = LlavaConfig(CLIP_LARGE_336, TextConfig(vocab_size=32064))


def example(words: int, learnt: int, per_picture: int = 81) -> Example:
    """A row of a picture and so many ids, of which the last are learnt."""
    ids = [1, -200, *range(5, 3 + words)]
    labels = [IGNORE_INDEX] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    row = Row(str(words), (PICTURE,), (("a", "b"),), None)
    return Example(row, ids, labels, row.pictures, len(ids) - 1 + per_picture, cut=False)


ROWS = [example(20, 5), example(31, 7), example(12, 3), example(25, 4)]


CASES = [
    ("lora", "float32"), ("lora", "bfloat16"), ("projector", "float32"), ("language", "float32"),
    ("everything", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("learn", "dtype", "tokens", "attention"),
    [
        *((*case, 0, "eager") for case in CASES),
        ("lora", "float32", 3, "fused"),
        ("language", "float32", 90, "fused"),
    ],
)
def test_predicted_bytes_are_those_of_the_bundled_model(learn, dtype, tokens, attention):
    """A machine would be bought by a plan that forgets what the backward pass keeps."""
    new = {f"<{i}>": 1000 + i for i in range(tokens)}
    recipe = replace(SMALL, learn=learn, dtype=dtype, add_tokens=new, attention=attention)
    assistant = minillava.load(
        ROOT / "weights" / "shapes", dtype=dtype, device="cpu", attention="eager"
    )
    model = assistant.model
    model.language_model.attend = ATTENTION[attention]
    model.projector.float()  # as open_model reads what learns
    plan = make_plan(model.config, recipe, ROWS)
    learning = prepare(model, recipe)
    optimiser = make_optimiser(learning, recipe)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    batch = collate(longest(ROWS, recipe.batch), assistant.image_processor)
    kept = Kept(model)
    with arithmetic(model, recipe), kept:
        loss = summed_loss(model, batch)
    loss.backward()
    optimiser.step()
    gradients = sum(p.grad.nbytes for p in learning.values())
    moments = sum(t.nbytes for state in optimiser.state.values() for t in state.values())
    assert (plan.weights, plan.gradients, plan.moments) == (weights, gradients, moments)
    assert (plan.activations, plan.again) == (kept.bytes, kept.again)
    assert sum(plan.learnt.values()) == sum(p.numel() for p in learning.values())


class Alive(TorchDispatchMode):
    """What operations made that is still in memory, but for what was there before."""

    def __init__(self, model):
        super().__init__()
        self.model = {p.untyped_storage()._cdata for p in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        out = operation(*arguments, **(named or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.model:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.parametrize(("learn", "dtype"), CASES)
def test_what_checkpointing_keeps_is_what_the_plan_says(learn, dtype):
    """A tower that learns was planned as if all of its blocks' numbers stayed. Counted is what is
    in memory after the forward pass of a run: all that the plan says but for one block."""
    recipe = replace(SMALL, learn=learn, dtype=dtype)
    assistant = open_model(recipe, Folders(ROOT / "weights" / "shapes"), "cpu")
    model = assistant.model
    prepare(model, recipe, again=True)
    batch = collate(longest(ROWS, recipe.batch), assistant.image_processor)
    alive = Alive(model)
    with arithmetic(model, recipe), alive:
        loss = summed_loss(model, batch)
    counted = alive.bytes() - loss.nbytes
    other = open_model(recipe, Folders(ROOT / "weights" / "shapes"), "cpu").model
    prepare(other, recipe)
    kept = Kept(other)
    with arithmetic(other, recipe), kept:
        summed_loss(other, batch)
    if learn == "everything":  # pixels, made before, are kept where the tower's first layer learns
        counted += batch.pixels.nbytes
    assert counted == kept.between


def test_checkpointing_is_chosen_where_the_plan_does_not_fit(monkeypatch):
    """A run would end out of memory after hours, or take a third longer for nothing."""
    config = minillava.checkpoint.config_json.read_config(ROOT / "weights" / "shapes")
    plan = make_plan(config, SMALL, ROWS)
    assert plan.memory(again=True) < plan.memory(again=False)
    for free, expected in ((plan.memory(False), False), (plan.memory(False) - 1, True)):
        monkeypatch.setattr("minillava.finetune.plan.available_memory", lambda _, free=free: free)
        assert checkpoints("auto", "lora", plan, "cpu") is expected
        assert checkpoints("on", "lora", plan, "cpu") and not checkpoints(
            "off", "lora", plan, "cpu"
        )
    monkeypatch.setattr("minillava.finetune.plan.available_memory", lambda _: 0)
    assert not checkpoints("auto", "medusa", plan, "cpu")
    with pytest.raises(ValueError, match="does nothing for --learn medusa"):
        checkpoints("on", "medusa", plan, "cpu")
    monkeypatch.setattr("minillava.finetune.plan.available_memory", lambda _: None)
    assert not checkpoints("auto", "lora", plan, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "gigabytes"),
    [
        ({"rank": 128}, 14.1 + 5.5),
        ({"rank": 16}, 14.1 + 1.0),
        ({"rank": 16, "quantize": "int8"}, 7.5 + 1.0),
        ({"rank": 16, "quantize": "int4"}, 4.6 + 1.0),
        ({"learn": "projector"}, 14.1 + 0.3),
        ({"learn": "language"}, 108.2 + 1.2),
    ],
)
def test_seven_billion_parameters_take_what_arithmetic_says(changed, gigabytes):
    """16 bytes for each parameter that learns, 2 for each that does not, fewer where quantised; the
    tower has 4 where a whole model learns. By hand, in 10^9 bytes."""
    plan = make_plan(WIDE, replace(SMALL, dtype="bfloat16", **changed), ROWS)
    assert plan.memory(again=True) - plan.again == pytest.approx(gigabytes * 1e9, abs=0.16e9)
    assert plan.total == 6_738_415_616 + 64 * 2 * 4096 + 20_979_712 + tower()


def tower() -> int:
    """Parameters of the tower up to the layer that is used."""
    with torch.device("meta"):
        return sum(p.numel() for p in minillava.llava.VisionTower(WIDE, None).parameters())


@pytest.mark.slow
def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    """The plan would not show what --checkpoint on is for. Per position and block, 7B keeps
    16 C + 6 F bytes of bfloat16 and the attention weights, and with it 2 C."""
    rows, recipe = [example(200, 20, 576)], replace(SMALL, rank=16, batch=1, dtype="bfloat16")
    plan = make_plan(WIDE, recipe, rows)
    without, again = plan.activations, plan.again
    positions, layers, width = rows[0].positions, 32, 4096
    inputs = positions * layers * width * 2
    block = (without - again + inputs) / (layers - 1)
    assert inputs < again < inputs + 2 * block
    assert block > positions * (16 * width + 6 * 11008)


def test_the_plan_is_told_with_its_time():
    """A user would begin a run of a month without knowing."""
    config = minillava.checkpoint.config_json.read_config(ROOT / "weights" / "shapes")
    recipe = replace(SMALL, updates=100)
    text = told(make_plan(config, recipe, ROWS), recipe, ROWS, False, "cpu")
    seconds = estimate_seconds(config, recipe, ROWS, False)
    assert 0 < seconds < 3600
    lines = {line.split()[0]: line for line in [*text.splitlines(), told_time(seconds)]}
    assert list(lines) == ["learn", "rows", "memory", "time"]
    assert lines["learn"].startswith("learn    0.1 M of 4.2 M parameters: ")
    assert "longest 111 positions" in lines["rows"]
    assert "activations" in lines["memory"] and "about" in lines["time"]


@pytest.mark.parametrize("learn", ["lora", "everything"])
def test_a_tower_that_learns_is_timed_with_its_backward_pass(monkeypatch, learn):
    """The time of --learn everything was told as if its vision tower only computed forward."""
    towers = []

    def worked(work, learning) -> float:
        """A second, whatever the work is; which parameters have a gradient then."""
        work()
        towers.append([parameter.grad is not None for parameter in learning])
        return 1.0

    monkeypatch.setattr("minillava.finetune.plan._seconds", worked)
    config = minillava.checkpoint.config_json.read_config(ROOT / "weights" / "shapes")
    recipe = replace(SMALL, learn=learn, updates=1)
    once, again = (estimate_seconds(config, recipe, ROWS, on) for on in (False, True))
    assert towers[2] and set(towers[2]) == {learn == "everything"}
    layers, others = config.text.num_hidden_layers, config.vision_layers_needed
    longer = layers + (others if learn == "everything" else 0)  # by a third, with checkpointing
    assert again / once == pytest.approx(1 + longer / 3 / (layers + others + 1))
