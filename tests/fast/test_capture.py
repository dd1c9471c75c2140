"""fast/compiled.py: decoding with shapes that stay is decoding; and the loop that runs a step ahead of
what it knows."""

import re
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from bounds import assert_same_in_float64
from models import stored
from paths import ROOT

from minillava import loop
from minillava.cache import KVCache
from minillava.chat.conversation import Conversation
from minillava.fast import ahead
from minillava.fast import compiled as capture
from minillava.fast.ahead import AsyncRead
from minillava.fast.compiled import CAPACITY_STEP, Captured, CapturedDecode, compile_decode, step
from minillava.generate.contrast import VCD
from minillava.generate.generation import generate
from minillava.loop import decode, prefill, steps

IDS = [[1, 30, -200, 41, 42], [1, -200, 41]]  # of unequal length: the second row is padded


@pytest.fixture(params=["plain", "grouped"])
def toy(request, reference):
    return stored(request.param)


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def run_ahead(monkeypatch, runs: bool) -> None:
    """The loop as on a GPU, or as on a CPU."""
    monkeypatch.setattr(ahead, "overlaps_reading", lambda device: runs)


@pytest.mark.numeric
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_a_captured_step_is_a_step(reference, name, pixels, rows):
    """Over every token of an answer the logits are those of the plain step, up to the order of
    sums."""
    toy = stored(name, dtype="float64")
    spliced = toy.model.splice(IDS[:rows], pixels[:rows])
    length, tokens = (
        spliced.embeds.shape[1],
        torch.randint(3, 90, (6, rows), generator=torch.Generator().manual_seed(1)),
    )
    wanted = {"hidden_states": False, "attentions": False}
    caches = [
        KVCache(toy.model.config.text, rows, length + n, dtype=torch.float64, device="cpu")
        for n in (6, 20)
    ]
    for tensor in (*caches[1].keys, *caches[1].values):
        tensor.fill_(float("nan"))  # what may lie in memory that nobody has written
    for cache in caches:
        prefill(toy.model, spliced, cache, **wanted)
    captured = CapturedDecode(partial(step, toy.model.language_model), caches[1])
    for ids in tokens:
        plain = decode(toy.model, ids, caches[0], **wanted).logits
        assert_same_in_float64(captured(ids).logits, plain)
    assert caches[0].length == caches[1].length == length + 6
    for a, b in zip(caches[0].keys, caches[1].keys, strict=True):
        assert_same_in_float64(a, b[:, :, : length + 6])


def test_a_full_cache_is_refused(toy):
    """A captured step would write past the end of its cache, where on a GPU nothing checks the
    place."""
    cache = KVCache(toy.model.config.text, 1, 0, dtype=torch.float32, device="cpu")
    with pytest.raises(
        ValueError, match="the cache holds 0 tokens: 0 are in it, 1 more do not fit"
    ):
        CapturedDecode(partial(step, toy.model.language_model), cache)(torch.tensor([5]))


def test_the_step_can_be_compiled_whole(reference, pixels, monkeypatch):
    """Without a compiler of C++: what torch.compile takes apart is put together again as it is."""
    toy, compiled = stored(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(capture.torch, "compile", partial(_compile, torch.compile, backend))
    plain = generate(toy.model, IDS, pixels, max_new_tokens=5).sequences
    compile_decode(toy.model)
    assert torch.equal(generate(toy.model, IDS, pixels, max_new_tokens=5).sequences, plain)
    assert len(compiled) == 1  # for four steps
    generate(toy.model, IDS, pixels, max_new_tokens=9)
    assert len(compiled) == 1  # and for another answer, since both caches have the same capacity
    recorded = generate(toy.model, IDS, pixels, max_new_tokens=5, record="attentions")
    assert torch.equal(recorded.sequences, plain)
    # what is recorded comes from the plain step
    assert recorded.attentions[1][0].shape[-1] < CAPACITY_STEP


def _compile(compile, backend, function, *, mode, fullgraph, dynamic):
    return compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic)


def test_what_cannot_be_compiled_is_one_line(toy, pixels, monkeypatch):
    """Without a compiler, --compile would end in a long traceback that does not say to leave it
    out."""

    def backend(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(capture.torch, "compile", partial(_compile, torch.compile, backend))
    compile_decode(toy.model)
    with pytest.raises(
        ValueError, match=r"torch.compile does not work here \(.*\); leave --compile out"
    ):
        generate(toy.model, IDS, pixels, max_new_tokens=3)


@pytest.mark.numeric
@pytest.mark.parametrize("captured", [False, True])
def test_running_ahead_changes_no_answer(toy, pixels, captured, monkeypatch):
    """The step that was begun before the last token was read would change an answer or how it
    ends."""
    first, second = generate(toy.model, IDS, pixels, max_new_tokens=12).sequences.tolist()
    # the rows end at different times
    end = next(i for i in first if [*first, i].index(i) != [*second, i].index(i))
    toy.model.config = replace(toy.model.config, eos_token_ids=(end,))
    found = {False: [], True: []}
    for runs, answers in found.items():
        run_ahead(monkeypatch, runs)
        if runs and captured:
            toy.model.decoding = Captured(partial(step, toy.model.language_model))
        for options in (
            {},
            {"max_new_tokens": 1},
            {"temperature": 1.0, "seed": 3},
            {"repetition_penalty": 1.3},
        ):
            made = generate(toy.model, IDS, pixels, **{"max_new_tokens": 12, **options})
            answers.append((made.sequences.tolist(), made.finish_reason))
        second = IDS, pixels.flip(0)
        made = generate(toy.model, IDS, pixels, second=second, contrast=VCD(), max_new_tokens=4)
        answers.append((made.sequences.tolist(), made.finish_reason))
    assert found[True] == found[False]
    assert found[True][0][1][0] == "stop"


def test_a_model_that_nobody_made_faster_answers_the_same(toy, pixels):
    """The loop needs no decoder but its own, and `load` gives a model another."""
    assert toy.model.decoding is ahead.decode_ahead
    fast = generate(toy.model, IDS, pixels, max_new_tokens=6, record="hidden_states")
    toy.model.decoding = None
    plain = generate(toy.model, IDS, pixels, max_new_tokens=6, record="hidden_states")
    assert torch.equal(plain.sequences, fast.sequences)
    for mine, other in zip(plain.hidden_states, fast.hidden_states, strict=True):
        assert all(map(torch.equal, mine, other))


@pytest.mark.parametrize("runs", [False, True])
def test_what_is_recorded_of_the_prompt_is_not_kept_by_the_loop(toy, pixels, runs, monkeypatch):
    """Attention weights of a long prompt are gigabytes."""
    run_ahead(monkeypatch, runs)
    made = []

    def prefill_and_note(*arguments, **wanted):
        output = prefill(*arguments, **wanted)
        made.append(weakref.ref(output))
        return output

    monkeypatch.setattr(loop, "prefill", prefill_and_note)
    spliced = toy.model.splice(IDS, pixels)
    answer = steps(toy.model, spliced, loop.Options(max_new_tokens=4), record=["attentions"])
    next(answer)
    assert made[0]() is not None
    next(answer)
    assert made[0]() is None


def test_the_step_too_many_is_forgotten(toy, pixels, monkeypatch):
    """The step that was begun after the end token would be shown, or stay in the cache for the next
    turn."""
    spliced = toy.model.splice(IDS[:1], pixels[:1])
    length, found = spliced.embeds.shape[1], []
    end = int(generate(toy.model, IDS[:1], pixels[:1], max_new_tokens=6).sequences[0, 3])
    toy.model.config = replace(toy.model.config, eos_token_ids=(end,))
    for runs in (False, True):
        run_ahead(monkeypatch, runs)
        cache = KVCache(toy.model.config.text, 1, length + 8, dtype=torch.float32, device="cpu")
        made = len(list(steps(toy.model, spliced, loop.Options(max_new_tokens=8), cache=cache)))
        found.append((made, cache.length))
    assert found[0] == found[1]
    assert found[0][0] <= 4


def test_a_conversation_overlaps_reading(toy, reference, monkeypatch):
    """Its cache grows while the answer does."""
    said = []
    for runs in (False, True):
        run_ahead(monkeypatch, runs)
        conversation = Conversation(toy)
        conversation.add_image(reference / "pictures" / "landscape.png")
        said.append(
            [
                conversation.ask("What?", max_new_tokens=7),
                conversation.ask("Why?", max_new_tokens=300),
            ]
        )
    assert said[0] == said[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("runs", [False, True])
def test_numbers_that_are_none_are_one_line(toy, pixels, runs, temperature, monkeypatch):
    """Before anything is drawn from them, which a GPU would not survive."""
    run_ahead(monkeypatch, runs)
    with torch.no_grad():
        toy.model.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the logits are not finite"):
        generate(toy.model, IDS, pixels, max_new_tokens=3, temperature=temperature)


def addresses(model) -> list[int]:
    return [tensor.data_ptr() for tensor in model.decoding.memory]


def test_the_next_answer_takes_the_same_memory(toy, pixels):
    """Each other address would be a graph of its own on a GPU. Two loops at once have a cache
    each."""
    toy.model.decoding = Captured(partial(step, toy.model.language_model))
    generate(toy.model, IDS, pixels, max_new_tokens=3)
    before = addresses(toy.model)
    first = generate(toy.model, IDS, pixels, max_new_tokens=5).sequences
    spliced, options = toy.model.splice(IDS, pixels), loop.Options(max_new_tokens=5)
    pairs = list(
        zip(steps(toy.model, spliced, options), steps(toy.model, spliced, options), strict=True)
    )
    for made in zip(*pairs, strict=True):
        assert torch.equal(torch.stack([s.token_ids for s in made], dim=1), first)
    assert addresses(toy.model) == before


@pytest.mark.slow
def test_answers_of_other_shapes_take_the_same_memory_too(reference, pixels, monkeypatch):
    """They did not: one row after two, and two after one, each was recorded anew on a GPU, and
    every recording stays. Padding, rows and capacities take turns here, and each shape is compiled
    once."""
    toy, compiled, seen = stored(), [], []

    def backend(graph, inputs):
        compiled.append(graph)

        def forward(*given):
            seen.append(given)
            return graph.forward(*given)

        return forward

    # ids, pictures, tokens at most
    shapes = [
        (ids, pixels[: len(ids)], most)
        for ids, most in [(IDS[:1], 3), (IDS, 3), (IDS[1:], CAPACITY_STEP), (IDS[:1] * 2, 3)]
    ]
    toy.model.config = replace(toy.model.config, eos_token_ids=())
    plain = [generate(toy.model, *asked, max_new_tokens=3).sequences for *asked, _ in shapes]
    monkeypatch.setattr(capture.torch, "compile", partial(_compile, torch.compile, backend))
    compile_decode(toy.model)

    def ask(ids, images, most):
        spliced = toy.model.splice(ids, images)
        answer = loop.steps(toy.model, spliced, loop.Options(max_new_tokens=most))
        made = [next(answer).token_ids for _ in range(3)]
        answer.close()
        return torch.stack(made, dim=1)

    for ids, images, most in reversed(shapes):  # until the largest has been there
        ask(ids, images, most)
    shapes_compiled, found = len(compiled), []
    for _ in range(2):
        seen.clear()
        for (ids, images, most), expected in zip(shapes, plain, strict=True):
            assert torch.equal(ask(ids, images, most), expected)
        memory = addresses(toy.model)
        tensors = [t for given in seen for t in given if isinstance(t, torch.Tensor)]
        assert {t.data_ptr() for t in tensors if t.dim() == 4} == set(memory)
        found.append(memory)
    assert found[0] == found[1]
    assert len(compiled) == shapes_compiled == 4


def test_only_more_than_ever_takes_other_memory(toy):
    """Each answer would allocate a cache of its own, which a GPU records anew, and keep them
    all."""
    text, like, captured = toy.model.config.text, torch.zeros(()), Captured(step)
    numbers = 2 * text.num_key_value_heads * CAPACITY_STEP * text.head_dim
    for rows in (1, 2, 1):
        with captured.spare_cache(text, rows, 5, like) as cache:
            assert (cache.capacity, cache.length, cache.padding_mask) == (CAPACITY_STEP, 0, None)
            assert cache.keys[0].shape[::2] == (rows, CAPACITY_STEP)
            assert len(cache.keys) == len(cache.values) == text.num_hidden_layers
    assert {len(tensor) for tensor in captured.memory} == {numbers}
    with captured.spare_cache(text, 1, 5, like.double()) as cache:
        assert cache.values[-1].dtype == torch.float64


def test_an_abandoned_answer_gives_its_memory_back(toy, pixels):
    """It did not: on a GPU the answer after it was recorded anew."""
    toy.model.decoding = Captured(partial(step, toy.model.language_model))
    spliced, options = toy.model.splice(IDS, pixels), loop.Options(max_new_tokens=5)
    for made in (0, 2):
        answer = steps(toy.model, spliced, options)
        for _ in range(made):
            next(answer)
        answer.close()
    before = addresses(toy.model)
    assert before
    with pytest.raises(RuntimeError, match="listener"):
        for _ in steps(toy.model, spliced, options):
            raise RuntimeError("a listener that fails")
    assert addresses(toy.model) == before


@pytest.mark.parametrize("captured", [False, True])
def test_the_first_token_is_there_before_the_second_step_begins(toy, pixels, captured, monkeypatch):
    """It came only when all kernels of that step had been begun, which takes a GPU as long as a
    token."""
    run_ahead(monkeypatch, True)
    begun = []

    def begin(*arguments, **wanted):
        begun.append(1)
        return (step if captured else real)(*arguments, **wanted)

    real = loop.decode
    monkeypatch.setattr(loop, "decode", begin)
    if captured:
        toy.model.decoding = Captured(partial(begin, toy.model.language_model))
    toy.model.config = replace(toy.model.config, eos_token_ids=())
    answer = loop.steps(toy.model, toy.model.splice(IDS, pixels), loop.Options(max_new_tokens=5))
    assert [len(begun) for _ in answer] == [0, 2, 3, 4, 4]


def test_what_arrives_is_waited_for_on_its_own_gpu(monkeypatch):
    """On a second GPU the wait was for the first, and the numbers were those that lay in the memory
    before."""
    here = torch.tensor([5, 6])

    class Elsewhere:
        is_cuda, device, shape, dtype = True, torch.device("cuda", 1), here.shape, here.dtype

    class Event:
        def record(self, stream):
            self.stream = stream

        def synchronize(self):
            assert self.stream == "the work of cuda:1"
            memory.numbers = here

    class Memory:
        def copy_(self, numbers, non_blocking):
            assert isinstance(numbers, Elsewhere)
            assert non_blocking

        def tolist(self):
            return self.numbers.tolist()

    memory = Memory()
    monkeypatch.setattr(loop.torch, "empty", lambda shape, *, dtype, pin_memory: memory)
    monkeypatch.setattr(loop.torch.cuda, "Event", Event)
    monkeypatch.setattr(
        loop.torch.cuda, "current_stream", lambda device=None: f"the work of {device}"
    )
    assert AsyncRead(Elsewhere()).wait() == [5, 6]


def test_nobody_reads_from_the_device_what_the_step_says_here():
    """`Step.ids` are there; `int(step.token_ids)` would make a GPU wait."""
    for path in [*(ROOT / "minillava").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        assert not re.search(
            r"(int|bool|float)\(step\.token_ids|step\.token_ids[^)]*\.tolist",
            path.read_text("utf-8"),
        ), path


def test_the_ids_of_a_step_are_its_tokens(toy, pixels):
    """The ids that callers read as numbers would be those of another step than its `token_ids`."""
    for made in steps(toy.model, toy.model.splice(IDS, pixels), loop.Options(max_new_tokens=4)):
        assert made.ids == made.token_ids.tolist()


def test_a_cache_from_inference_mode_serves_later_answers(toy, pixels):
    """A cache made in inference mode would refuse to be written to by the answer after it."""
    toy.model.decoding = Captured(partial(step, toy.model.language_model))
    with torch.inference_mode():
        first = generate(toy.model, IDS, pixels, max_new_tokens=4).sequences
    assert torch.equal(generate(toy.model, IDS, pixels, max_new_tokens=4).sequences, first)
