"""Learning: what moves and what does not, and the numbers of transformers, PEFT and AdamW to the
last bit."""

import math

import hf
import pytest
import torch
from paths import REFERENCE

import minillava
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import PREFIXES, renamed
from minillava.config import IGNORE_INDEX
from minillava.fast.quantize import QuantisedLinear
from minillava.finetune import loop
from minillava.finetune.learning import make_optimiser, prepare
from minillava.finetune.loop import Batch, summed_loss, summed_loss_of_all, train
from minillava.finetune.lora import lora_layers
from minillava.finetune.recipe import Recipe
from minillava.finetune.rows import Example, Row
from minillava.finetune.start import open_model

SHORT = {"batch": 1, "accumulate": 2, "rank": 4, "alpha": 8, "dropout": 0.0, "rate": 1e-3,
         "projector_rate": 1e-3, "order": "file", "warmup": 0.0, "clip": 1.0}  # fmt: skip


def toy() -> "minillava.Assistant":
    return minillava.load(REFERENCE / "plain", device="cpu", dtype="float32", attention="eager")


def example(ids: list[int], learnt: int, pictures: int = 1) -> Example:
    """A row that learns its last ids; its pictures are noise, of a seed each."""
    labels = [IGNORE_INDEX] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    row = Row(str(len(ids)), (), (("a b " * len(ids), "c"),), None)
    return Example(row, ids, labels, tuple(range(pictures)), len(ids), cut=False)


EXAMPLES = [
    example([1, 5, -200, 17, 300, 42], 3),
    example([1, 7, 8, -200, 9, 11, 12, 13], 2),
    example([1, -200, 77, 78, 2], 3),
    example([1, 9, 3, -200, 2, 2], 2),
]


class Noise:
    """Pictures by their seeds."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, seeds: list) -> torch.Tensor:
        drawn = [
            torch.randn(3, self.side, self.side, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return torch.stack(drawn) if drawn else torch.zeros(0, 3, self.side, self.side)


def run(recipe: Recipe, assistant=None, start: int = 0, examples=EXAMPLES):
    """(the model, what learns by name, the records) of a whole run."""
    assistant = assistant or toy()
    learning = prepare(assistant.model, recipe)
    processor = Noise(assistant.image_processor.image_size)
    optimiser = make_optimiser(learning, recipe)
    records = list(train(assistant.model, examples, processor, recipe, optimiser, start))
    return assistant.model, learning, records


@pytest.mark.parametrize("learn", ["projector", "lora", "language", "everything"])
def test_what_is_frozen_does_not_move(learn):
    """A suffix list of layers learns the vision tower's, too, which no recipe asks for."""
    before = {name: tensor.clone() for name, tensor in toy().model.state_dict().items()}
    model, learning, records = run(Recipe(**SHORT, learn=learn, updates=3))
    layers = len(model.language_model.layers)
    language = sum(name.startswith("language_model.") for name in before)
    expected = {"projector": 4, "lora": 2 * 7 * layers + 4, "language": language + 4}
    assert len(learning) == {**expected, "everything": len(before)}[learn]
    changed = set()
    for name, tensor in model.state_dict().items():
        ours = name.replace(".base.", ".")
        if ours in before and not torch.equal(tensor, before[ours]):
            changed.add(ours)
    tower = {name for name in changed if name.startswith("vision_tower.")}
    assert bool(tower) == (learn == "everything")
    assert {name for name in changed if name.startswith("projector.")}
    if learn in ("projector", "lora"):
        assert not any(name.startswith("language_model.") for name in changed)
    assert len(records) == 3 and all(math.isfinite(record.loss) for record in records)


def test_the_first_update_of_a_warm_up_moves_nothing():
    """Its rate is 0, as published."""
    recipe = Recipe(**{**SHORT, "warmup": 0.5}, updates=1)
    model, _, (record,) = run(recipe)
    assert record.rates == {"LoRA": 0.0, "projector": 0.0}
    before = toy().model.state_dict()
    assert torch.equal(
        model.projector.state_dict()["linear_1.weight"], before["projector.linear_1.weight"]
    )


def test_a_loss_is_the_mean_over_the_tokens_of_an_update():
    """Micro-batches of unequal length are one batch of all their rows; LLaVA's own mean is one of
    means."""
    in_two = Recipe(**SHORT, learn="projector", updates=1)
    in_one = Recipe(**{**SHORT, "batch": 2, "accumulate": 1}, learn="projector", updates=1)
    losses = []
    for recipe in (in_two, in_one):
        assistant = toy()
        assistant.model.double()
        losses.append(run(recipe, assistant)[2][0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    each = [
        run(Recipe(**{**SHORT, "accumulate": 1}, learn="projector", updates=1), examples=[row])[2][
            0
        ]
        for row in EXAMPLES[:2]
    ]
    means = Recipe(**SHORT, learn="projector", updates=1, loss_mean="microbatch")
    assert run(means)[2][0].loss == pytest.approx(sum(r.loss for r in each) / 2, rel=1e-6)
    tokens = [record.tokens for record in each]
    weighted = sum(record.loss * record.tokens for record in each) / sum(tokens)
    assert run(in_two)[2][0].loss == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize(("start", "expected"), [(0, [0, 1, 2]), (3, [1, 2])])
def test_an_epoch_is_put_in_order_once(monkeypatch, start, expected):
    """It was for every update: 3.6 s each with as many rows as LLaVA has."""
    real, epochs = loop.rows_in_order, []

    def counted(*arguments):
        epochs.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(loop, "rows_in_order", counted)
    recipe = Recipe(**{**SHORT, "order": "shuffle"}, learn="projector", updates=5)
    records = run(recipe, start=start)[2]
    assert epochs == expected
    assert [(r.update, r.epoch) for r in records] == [(u + 1, u // 2) for u in range(start, 5)]


def test_a_loss_that_is_not_finite_stops_and_names_the_rows():
    """A trainer that logs 0.0 for it goes on with weights that are all NaN."""
    recipe = Recipe(**SHORT, learn="projector", updates=1)
    assistant = toy()
    with torch.no_grad():
        assistant.model.language_model.norm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"update 1: the loss is nan.* its rows: 6, 8"):
        run(recipe, assistant)


def test_dropout_is_a_function_of_the_update():
    """A resumed run would drop other numbers out, and end in other weights."""
    recipe = Recipe(**{**SHORT, "dropout": 0.5}, updates=2)
    torch.manual_seed(1)
    first = run(recipe)[2]
    torch.manual_seed(2)
    assert [r.loss for r in run(recipe)[2]] == [r.loss for r in first]
    other = Recipe(**{**SHORT, "dropout": 0.5}, updates=2, seed=7)
    assert [r.loss for r in run(other)[2]] != [r.loss for r in first]


@pytest.mark.parametrize("learn", ["lora", "everything"])
def test_blocks_that_are_computed_again_give_the_same_bits(learn):
    """Less memory would cost another result; dropout would drop other numbers out the second
    time."""
    found = []
    for again in (False, True):
        recipe = Recipe(**{**SHORT, "dropout": 0.3}, learn=learn, updates=2)
        assistant = toy()
        learning = prepare(assistant.model, recipe, again)
        processor = Noise(assistant.image_processor.image_size)
        optimiser = make_optimiser(learning, recipe)
        records = list(train(assistant.model, EXAMPLES, processor, recipe, optimiser))
        found.append(([(r.loss, r.norm) for r in records], learning))
    assert found[0][0] == found[1][0]
    for name, parameter in found[0][1].items():
        assert torch.equal(parameter, found[1][1][name]), name


def test_the_head_at_the_learnt_positions_alone_gives_the_same_loss():
    """In float64; a position would be left out, or predict another token than the next."""
    assistant = toy()
    assistant.model.double()
    processor = Noise(assistant.image_processor.image_size)
    rows = [EXAMPLES[0], EXAMPLES[3], example([1, 9, 3, 4], 2, pictures=0)]
    pixels = processor([0, 0]).double()
    batch = Batch([r.ids for r in rows], [r.labels for r in rows], pixels, 7)
    found = [loss(assistant.model, batch).item() for loss in (summed_loss, summed_loss_of_all)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("learn", ["lora", "language"])
def test_in_bfloat16_what_learns_stays_float32(learn):
    """Small updates would be rounded away. The losses lie as near to those of float32 as 8 bits
    let them."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        recipe = Recipe(**SHORT, learn=learn, updates=3, dtype=dtype)
        assistant = open_model(recipe, Folders(REFERENCE / "plain"), "cpu")
        _, learning, records = run(recipe, assistant)
        losses.append([record.loss for record in records])
        assert {parameter.dtype for parameter in learning.values()} == {torch.float32}
    frozen = {p.dtype for p in assistant.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16 if learn == "lora" else torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parity
def test_the_gradients_of_a_row_are_those_of_transformers_to_the_last_bit():
    """Of every weight of the network, the vision tower's included."""
    pytest.importorskip("transformers")
    assistant, row = toy(), EXAMPLES[0]
    learning = prepare(assistant.model, Recipe(**SHORT, learn="everything"))
    pixels = Noise(assistant.image_processor.image_size)(row.pictures)
    loss = summed_loss_of_all(assistant.model, Batch([row.ids], [row.labels], pixels, row.learnt))
    (loss / row.learnt).backward()

    theirs = hf.load(REFERENCE / "plain").requires_grad_(True)
    out = theirs(
        **hf.inputs(theirs, [row.ids], [row.labels]), pixel_values=pixels, use_cache=False,
        num_items_in_batch=torch.tensor(row.learnt),
    )  # fmt: skip
    out.loss.backward()
    named = {renamed(name, PREFIXES): p for name, p in theirs.named_parameters()}
    assert loss.item() / row.learnt == pytest.approx(out.loss.item(), rel=1e-7)
    assert len(learning) == len(assistant.model.state_dict())
    for name, parameter in learning.items():
        assert torch.equal(parameter.grad, named[name].grad), name


@pytest.mark.parity
def test_a_batch_of_all_kinds_has_the_gradients_of_transformers_in_float64():
    """Rows of several lengths, one with two pictures, one with none."""
    pytest.importorskip("transformers")
    rows = [EXAMPLES[1], example([1, -200, 5, 6, -200, 7, 8], 2, 2), example([1, 9, 3, 4], 2, 0)]
    options = {"device": "cpu", "dtype": "float64", "attention": "eager"}
    assistant = minillava.load(REFERENCE / "plain", **options)
    learning = prepare(assistant.model, Recipe(**SHORT, learn="everything"))
    pixels = Noise(assistant.image_processor.image_size)([0, 1, 2]).double()
    ids, labels = [row.ids for row in rows], [row.labels for row in rows]
    loss = summed_loss(assistant.model, Batch(ids, labels, pixels, 6))
    loss.backward()
    with hf.float64():
        theirs = hf.load(REFERENCE / "plain", "float64").requires_grad_(True)
        given = hf.inputs(theirs, ids, labels)
        following = given.pop("labels")[:, 1:].flatten()
        logits = theirs(**given, pixel_values=pixels, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), following, reduction="sum"
        )
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    named = {renamed(name, PREFIXES): p for name, p in theirs.named_parameters()}
    norm = torch.stack([p.grad.norm() for p in learning.values()]).norm()
    for name, parameter in learning.items():
        assert (parameter.grad - named[name].grad).norm() < 1e-12 * norm, name


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_updates_are_those_of_transformers_peft_and_adamw_to_the_last_bit():
    """LoRA and projector, rows with pictures, two micro-batches an update, the gradient cut to norm
    1: losses, norms and every learnt tensor."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    recipe = Recipe(**SHORT, updates=4)
    assistant = toy()
    learning = prepare(assistant.model, recipe)

    theirs = hf.load(REFERENCE / "plain")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=r".*language_model\.layers.*_proj",
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config)
    named = {their_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert named.keys() == learning.keys()
    with torch.no_grad():
        for name, parameter in learning.items():
            named[name].copy_(parameter)
    # in the order of ours, since a norm is a sum
    oracle = [named[name] for name in learning]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n.startswith("projector.")]},
            {"params": [p for n, p in named.items() if not n.startswith("projector.")]},
        ],
        lr=0.0,
        weight_decay=0.0,
    )
    processor = Noise(assistant.image_processor.image_size)
    records = train(
        assistant.model, EXAMPLES, processor, recipe, make_optimiser(learning, recipe),
        loss_of=summed_loss_of_all,
    )  # fmt: skip
    for update, record in enumerate(records):
        rows = [EXAMPLES[(2 * update + i) % 4] for i in range(2)]
        tokens = torch.tensor(sum(row.learnt for row in rows))
        loss = 0.0
        for row in rows:
            given = hf.inputs(theirs.base_model.model, [row.ids], [row.labels])
            out = theirs(
                **given, pixel_values=processor(row.pictures), use_cache=False,
                num_items_in_batch=tokens,
            )  # fmt: skip
            out.loss.backward()
            loss += out.loss.item()
        norm = torch.nn.utils.clip_grad_norm_(in_groups(oracle, learning), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = record.rates["LoRA"]
        optimiser.step()
        optimiser.zero_grad()
        assert (record.loss, record.norm) == (loss, norm.item()), update
        for name, parameter in learning.items():
            assert torch.equal(named[name], parameter), (update, name)


@pytest.mark.parity
def test_updates_are_those_of_transformers_own_trainer(tmp_path):
    """Its Trainer counts an update's tokens over micro-batches of unequal length: two updates of
    the projector end in the same bits, rates and all."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    recipe = Recipe(**{**SHORT, "clip": 0.0}, learn="projector", updates=2)
    assistant = toy()
    learning = prepare(assistant.model, recipe)
    processor = Noise(assistant.image_processor.image_size)
    optimiser = make_optimiser(learning, recipe)
    ours = list(
        train(assistant.model, EXAMPLES, processor, recipe, optimiser, loss_of=summed_loss_of_all)
    )

    theirs = hf.load(REFERENCE / "plain").requires_grad_(False)
    theirs.model.multi_modal_projector.requires_grad_(True)

    def collated(rows: list[Example]) -> dict[str, torch.Tensor]:
        given = hf.inputs(theirs, [row.ids for row in rows], [row.labels for row in rows])
        return {**given, "pixel_values": processor([i for row in rows for i in row.pictures])}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(EXAMPLES)

    trainer = InOrder(
        theirs,
        transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2,
            max_steps=2, learning_rate=1e-3, lr_scheduler_type="cosine", max_grad_norm=0.0,
            weight_decay=0.0, optim="adamw_torch", use_cpu=True, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        ),
        data_collator=collated,
        train_dataset=EXAMPLES,
    )  # fmt: skip
    trainer.train()
    told = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    # the Trainer logs four digits; losses of about ten are of float32
    assert [float(loss) for loss in told] == pytest.approx([r.loss for r in ours], abs=5e-5 + 1e-6)
    named = {renamed(name, PREFIXES): p for name, p in theirs.named_parameters()}
    for name, parameter in learning.items():
        assert torch.equal(named[name], parameter), name


def in_groups(oracle: list, learning: dict) -> list:
    """The parameters in the order of our optimiser's groups."""
    names = list(learning)
    groups = make_optimiser(dict(learning), Recipe(**SHORT)).param_groups
    flat = [p for group in groups for p in group["params"]]
    places = {id(parameter): i for i, parameter in enumerate(learning.values())}
    assert len(flat) == len(names)
    return [oracle[places[id(parameter)]] for parameter in flat]


def their_name(name: str) -> str:
    """Our name of a parameter of PEFT's."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    name = name.replace("multi_modal_projector.modules_to_save.default.", "projector.")
    return name.replace(".default.weight", "")


def test_a_lora_changes_nothing_before_it_has_learnt():
    """A fresh adapter would start from another model, or miss some of its layers."""
    assistant, processor = toy(), Noise(toy().image_processor.image_size)
    row = EXAMPLES[0]
    batch = Batch([row.ids], [row.labels], processor(row.pictures), row.learnt)
    before = summed_loss(assistant.model, batch).item()
    prepare(assistant.model, Recipe(**SHORT))
    assert summed_loss(assistant.model, batch).item() == before
    assert len(lora_layers(assistant.model)) == 7 * len(assistant.model.language_model.layers)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_a_gaussian_start_and_the_scale_of_rslora_are_those_of_peft():
    """The same numbers from the same seed, layer by layer: A with a deviation of 1 / r, and B·A
    counted alpha / √r."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    recipe = Recipe(**SHORT, init="gaussian", rslora=True)
    learning = prepare((assistant := toy()).model, recipe)
    theirs = hf.load(REFERENCE / "plain")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*language_model\.layers.*_proj", use_rslora=True,
        init_lora_weights="gaussian",
    ))  # fmt: skip
    layers = {
        their_name(name): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert layers.keys() == lora_layers(assistant.model).keys()
    torch.manual_seed(recipe.seed)
    for name, layer in layers.items():
        layer.reset_lora_parameters("default", "gaussian")
        assert torch.equal(layer.lora_A["default"].weight, learning[f"{name}.lora_A"]), name
        assert layer.scaling["default"] == lora_layers(assistant.model)[name].scale


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_gradient_through_quantised_weights_is_that_through_the_numbers_they_stand_for(kind):
    """In float64, where the order of a sum does not show."""
    options = {"device": "cpu", "dtype": "float64", "attention": "eager"}
    small, wide = (
        minillava.load(REFERENCE / "plain", quantize=quantize, **options)
        for quantize in (kind, None)
    )
    for name, module in small.model.named_modules():
        if isinstance(module, QuantisedLinear):
            with torch.no_grad():
                weight = module.dequantise(slice(None), torch.float64)
                wide.model.get_submodule(name).weight.copy_(weight)
    losses, gradients = [], []
    for model in (small.model, wide.model):
        learning = prepare(model, Recipe(**SHORT))
        for name, parameter in learning.items():
            parameter.data = parameter.data.double()
            if name.endswith("lora_B"):  # of zeros it would leave A without a gradient
                drawn = torch.Generator().manual_seed(len(name))
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=drawn).double()
        row = EXAMPLES[0]
        pixels = Noise(small.image_processor.image_size)(row.pictures).double()
        loss = summed_loss(model, Batch([row.ids], [row.labels], pixels, row.learnt))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in learning.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    norm = torch.stack([g.norm() for g in gradients[1].values()]).norm()
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float64
        assert (gradient - gradients[1][name]).norm() < 1e-12 * norm, name
