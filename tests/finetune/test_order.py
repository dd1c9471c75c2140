"""Order and rates of LLaVA's training, by numbers that its own functions gave."""

import pytest
import torch

from minillava.finetune.order import blocks, grouped, micro_batches, rows_in_order
from minillava.finetune.recipe import RECIPES, Recipe, rate_factor, read_recipe

WORDS = [5, -9, 7, -3, 12, -4, 6, -8, 10, -2, 11, 9]


@pytest.mark.parametrize(
    ("words", "batch", "parts", "expected"),
    [
        (WORDS, 2, 2, "7 9 5 3 10 0 8 6 1 2 4 11"),
        (WORDS, 1, 2, "10 6 5 9 4 11 7 3 8 0 1 2"),
        ([abs(count) for count in WORDS], 2, 2, "8 9 0 5 4 2 10 7 1 6 11 3"),
    ],
)
def test_rows_are_grouped_as_llava_groups_them(words, batch, parts, expected):
    """From LLaVA's own functions after torch.manual_seed(0)."""
    found = grouped(words, batch, parts, torch.Generator().manual_seed(0))
    assert " ".join(map(str, found)) == expected


@pytest.mark.parametrize("order", ["length", "shuffle", "file"])
@pytest.mark.parametrize("rows", [1, 5, 12, 13])
def test_every_row_comes_once_an_epoch(order, rows):
    """A row would be left out of an epoch, or be learnt twice."""
    words = [(-1) ** i * (i % 7 + 1) for i in range(rows)]
    found = rows_in_order(words, order, 2, 3, seed=1, epoch=0)
    assert sorted(found) == list(range(rows))
    updates = micro_batches(found, 2, 3)
    assert [i for update in updates for micro in update for i in micro] == found
    assert all(len(update) == 3 for update in updates[:-1])
    assert max(len(micro) for update in updates for micro in update) <= 2


def test_an_order_is_a_function_of_seed_and_epoch_alone():
    """A resumed run would see its rows in another order."""
    torch.manual_seed(1)
    first = rows_in_order(WORDS, "length", 2, 2, seed=3, epoch=1)
    torch.rand(5)
    assert rows_in_order(WORDS, "length", 2, 2, seed=3, epoch=1) == first
    assert rows_in_order(WORDS, "length", 2, 2, seed=3, epoch=2) != first
    assert blocks(range(5), 2) == [[0, 1], [2, 3], [4]]


def test_rates_of_the_published_run():
    """2.8205128205128207e-06 stands in the log of a published run of 5,198 updates."""
    rates = [2e-5 * rate_factor(update, 5198, 0.03) for update in (0, 22, 156, 2677)]
    assert rates[:3] == [0, 2.8205128205128207e-06, 2e-5]
    assert rates[3] == pytest.approx(1e-5, rel=1e-12)
    assert rate_factor(5198, 5198, 0.03) == pytest.approx(0, abs=1e-15)


@pytest.mark.parity
@pytest.mark.parametrize("updates", [7, 40, 5198])
def test_rates_are_those_of_transformers(updates):
    """The learning rate would differ in the last bit from the run it reproduces."""
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([parameter], lr=1.0)
    warmup = -(-3 * updates // 100)
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, warmup, updates)
    for update in range(updates):
        assert schedule.get_last_lr()[0] == rate_factor(update, updates, 0.03), update
        optimiser.step()
        schedule.step()


def test_recipes_are_the_published_ones():
    """A recipe would learn with another batch or rate than LLaVA's."""
    found = {name: read_recipe(name, {}) for name in RECIPES}
    assert [recipe.batch * recipe.accumulate for recipe in found.values()] == [
        256,
        128,
        128,
        128,
        128,
    ]
    assert (found["stage1"].template, found["stage1"].aspect) == ("plain", "crop")
    assert (found["stage1"].rate, found["stage2"].rate, found["lora"].rate) == (1e-3, 2e-5, 2e-4)
    assert (found["lora"].rank, found["lora"].alpha, found["lora"].dropout) == (128, 256, 0.05)
    assert found["lora"].projector_rate == 2e-5
    assert read_recipe("lora", {"rank": 4, "alpha": None}) == Recipe(rank=4, alpha=8)


def test_one_rate_is_the_projectors_where_nothing_else_learns():
    """--rate would change nothing in stage 1, where only the projector learns."""
    assert read_recipe("stage1", {"rate": 5e-4}).projector_rate == 5e-4
    assert read_recipe("lora", {"rate": 5e-4}).projector_rate == 2e-5


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"dropout": 1.0}, {"learn": "tower"}, {"batch": 0}, {"rate": -1.0}]
)
def test_a_setting_out_of_range_is_refused_with_its_value(wrong):
    """A rank of 0 or a negative rate would learn nothing, or the wrong way."""
    (value,) = wrong.values()
    with pytest.raises(ValueError, match=str(value)):
        read_recipe("lora", wrong)
