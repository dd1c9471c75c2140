"""Hooks on a model: in one thread, until the end of a `with`, in any order."""

import threading
from itertools import chain

import pytest
import torch
from models import stored

import minillava
from minillava.cli.hooks import Hooks, step_by_step
from minillava.fast import ahead
from minillava.fast.compiled import Captured
from minillava.look.run import watch
from minillava.loop import Options

IDS = torch.tensor([[1, 5, 9, 7]])


@pytest.fixture(scope="module")
def model(reference):
    return stored().model


def hooks_on(model) -> int:
    tables = ((m._forward_pre_hooks, m._forward_hooks) for m in model.modules())
    return sum(map(len, chain.from_iterable(tables)))


@torch.no_grad()
def test_another_thread_notices_nothing(model):
    """look put its function on the model itself: a second thread's rows came among the first's."""
    language, seen, elsewhere = model.language_model, [], []
    plain = language(IDS).logits
    with Hooks() as hooks:
        for layer in language.layers:
            hooks.before(layer, lambda module, given: seen.append(threading.get_ident()))
            hooks.after(layer.mlp, lambda module, given, output: output * 0)
        other = threading.Thread(target=lambda: elsewhere.append(run(language)))
        other.start()
        other.join()
        assert seen == []
        assert torch.equal(elsewhere[0], plain)
        assert not torch.equal(language(IDS).logits, plain)
        assert seen == [threading.get_ident()] * len(language.layers)
    assert hooks_on(model) == 0


@torch.no_grad()
def run(language) -> torch.Tensor:
    return language(IDS).logits


@torch.no_grad()
def test_the_first_may_leave_before_the_second(model):
    """Each put back what it had found: who left last brought the other's function back for good."""
    language, layer = model.language_model, model.language_model.layers[0].self_attn
    plain = language(IDS).logits
    one, other = Hooks(), Hooks()
    calls = []
    for hooks, name in ((one, "one"), (other, "other")):
        hooks.attention(layer, lambda context, name=name: calls.append(name))
    one.close()
    assert torch.equal(language(IDS).logits, plain)
    assert calls == ["other"]
    other.close()
    assert hooks_on(model) == 0


@torch.no_grad()
def test_an_error_takes_them_away(model):
    """After an error the model would go on calling a function that fails."""

    def broken(context):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Hooks() as hooks:
        hooks.attention(model.language_model.layers[1].self_attn, broken)
        model.language_model(IDS)
    assert hooks_on(model) == 0


@torch.no_grad()
def test_two_functions_wrap_each_other(model):
    """Each calls what the context had before it."""
    language, order = model.language_model, []

    def wrap(name):
        def change(context):
            def attend(*given):
                order.append(name)
                return context.attend(*given)

            return context._replace(attend=attend)

        return change

    plain = language(IDS).logits
    with Hooks() as hooks:
        hooks.attention(language.layers[0].self_attn, wrap("inner"))
        hooks.attention(language.layers[0].self_attn, wrap("outer"))
        assert torch.equal(language(IDS).logits, plain)
    assert order == ["outer", "inner"]


@torch.no_grad()
def test_attention_that_is_recorded_is_watched_as_well(reference, model):
    """The loop records by a function of its own, and look then saw no row at all."""
    toy = stored()
    picture = minillava.image.Image.new("RGB", (30, 20), "red")
    spliced = toy.prepare(picture, toy.prompt("What?"))
    for step, rows in watch(
        toy.model, spliced, Options(max_new_tokens=3), toy.tokenizer, ("attentions",)
    ):
        start, end = spliced.image_spans[0][0]
        recorded = torch.stack([layer[0, :, -1, start:end] for layer in step.attentions])
        assert torch.equal(rows, recorded)


def test_a_compiled_step_is_left_for_the_layers(model):
    """It calls no hooks: nothing would be watched but the prompt."""
    before = model.decoding
    try:
        model.decoding = Captured(lambda *_: None)
        plain = step_by_step(model)
        assert plain.language_model is model.language_model
        assert plain.decoding is None
        assert isinstance(model.decoding, Captured)
    finally:
        model.decoding = before


@torch.no_grad()
def test_a_gpu_does_not_show_the_next_token_s_attention(reference, monkeypatch):
    """A step that it had begun ahead was noted with the token before: from the third token on every
    map was the next one's."""
    toy = stored()
    picture = minillava.image.Image.new("RGB", (30, 20), "red")
    spliced = toy.prepare(picture, toy.prompt("What?"))
    options = Options(max_new_tokens=5)

    def maps() -> list[torch.Tensor]:
        return [rows for _, rows in watch(toy.model, spliced, options, toy.tokenizer)]

    in_turn = maps()
    monkeypatch.setattr(ahead, "overlaps_reading", lambda device: True)
    assert toy.model.decoding is ahead.decode_ahead
    assert len({rows.numpy().tobytes() for rows in in_turn}) == len(in_turn) == 5
    assert all(map(torch.equal, maps(), in_turn))
