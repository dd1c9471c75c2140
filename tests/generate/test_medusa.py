"""Medusa: heads on the model guess what it says next, and the answer stays the plain one."""

import json
from itertools import cycle

import pytest
import torch
from bounds import assert_same_in_float64
from models import stored, tiny
from paths import REFERENCE
from safetensors.torch import save_file

from minillava.cache import KVCache
from minillava.fast import processor
from minillava.fast.processor import SAME_ROWS
from minillava.generate.contrast import M3ID, VCD
from minillava.generate.generation import generate
from minillava.generate.medusa import Heads, Medusa
from minillava.generate.speculate import MOST, Drafts, Pace
from minillava.generate.tree import Tree, chain, most_likely, positions_and_mask
from minillava.loop import steps
from minillava.options import RECORDABLE, Options

WEIGHTS = REFERENCE.parents[1] / "weights/shapes"

IDS = [1, 30, -200, 41, 42]


def random_heads(width: int, rows: int = 0, count: int = 3, layers: int = 1) -> Heads:
    heads = Heads(count, width, layers, rows)
    generator = torch.Generator().manual_seed(0)
    for tensor in heads.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return heads.requires_grad_(False)


def tensors_of(heads: Heads) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}


@pytest.fixture(scope="module", params=["grouped", "tied"])
def toy(request):
    return stored(request.param, dtype="float64")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)).double()


def parts(made):
    return [(s.ids, s.text, s.finish_reason) for s in made]


# --- the heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "layers"), [(0, 1), (50, 1), (50, 2)])
def test_a_head_is_its_formula(rows, layers):
    """The product before the sum, or another activation, would load and guess at random."""
    model = tiny()
    heads = random_heads(32, rows, layers=layers)
    hidden = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, tensors = heads(hidden, model.language_model), tensors_of(heads)
    assert found.shape == (4, 3, 50)
    for k in range(3):
        x = hidden
        for j in range(layers):
            y = x @ tensors[f"{k}.{j}.linear.weight"].T + tensors[f"{k}.{j}.linear.bias"]
            x = x + y / (1 + torch.exp(-y))
        head = tensors.get(f"{k}.{layers}.weight", model.language_model.lm_head.weight)
        torch.testing.assert_close(found[:, k], x @ head.T, rtol=1e-12, atol=1e-12)


def layouts(rows: int, width: int) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """The same two heads by layout: the file, and its tensors."""
    ours = tensors_of(random_heads(width, rows, count=2))
    vllm = {}
    for name, tensor in ours.items():
        head, layer, kind = name.split(".", 2)
        at = f"lm_heads.{head}" if kind == "weight" else f"blocks.{head}.layers.{layer}"
        vllm[f"{at}.{kind.removeprefix('linear.')}"] = tensor
    beside = {"model.norm.weight": torch.ones(width), "lm_head.weight": torch.ones(4, width)}
    return {
        "medusa": ("medusa_lm_head.pt", ours),
        "safetensors": ("medusa_lm_head.safetensors", ours),
        "medusa-2": (
            "model.safetensors",
            {f"medusa_head.{n}": t for n, t in ours.items()} | beside,
        ),
        "vllm": ("model.safetensors", vllm),
        "vllm, its class's names": (
            "model.safetensors",
            {f"medusa_heads.{name}": tensor for name, tensor in vllm.items()},
        ),
    }


def write(folder, name, tensors):
    folder.mkdir(exist_ok=True)
    if name.endswith(".pt"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


@pytest.mark.parametrize("shared", [False, True])
def test_every_layout_gives_the_same_heads(tmp_path, shared):
    """A layout that was misread loaded, and not one guess was right. The number of heads in
    config.json is wrong in published folders, and not asked."""
    assistant = stored("plain", dtype="float64")
    config = assistant.model.config.text
    rows = 0 if shared else config.vocab_size
    hidden = torch.randn(3, config.hidden_size, dtype=torch.float64)
    language = assistant.model.language_model
    expected = random_heads(config.hidden_size, rows, count=2)(hidden, language)
    for name, (file, tensors) in layouts(rows, config.hidden_size).items():
        folder = write(tmp_path / name, file, tensors)
        (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 7, "num_heads": 7}))
        heads = assistant.drafts(f"medusa:{folder}").drafter.heads
        assert torch.equal(heads(hidden, language), expected), name


def test_one_vocabulary_may_be_that_of_all_heads(tmp_path):
    """vLLM stores a head that all share once, and would be refused as incomplete."""
    assistant = stored("plain", dtype="float64")
    config = assistant.model.config.text
    file, tensors = layouts(config.vocab_size, config.hidden_size)["vllm"]
    del tensors["lm_heads.1.weight"]
    heads = assistant.drafts(f"medusa:{write(tmp_path / 'one', file, tensors)}").drafter.heads
    assert torch.equal(heads[1][1].weight, tensors["lm_heads.0.weight"])


def test_a_truncated_vocabulary_names_its_tokens(tmp_path):
    """Row 3 of it was taken for token 3."""
    assistant = stored("plain", dtype="float64")
    width = assistant.model.config.text.hidden_size
    file, tensors = layouts(6, width)["vllm"]
    tensors["token_map"] = torch.tensor([9, 300, 41, 7, 12, 88])
    drafter = assistant.drafts(f"medusa:{write(tmp_path / 'few', file, tensors)}").drafter
    draft = drafter.begin([], None, ())
    for i in range(8):
        hidden = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        draft.accept([5], hidden)
        best = drafter.heads(hidden, assistant.model.language_model).argmax(-1)
        assert draft.propose(9).as_chain().tokens == tensors["token_map"][best].tolist()


def changed(tensors, **others):
    return {name: others.get(name, tensor) for name, tensor in tensors.items()}


def test_heads_of_another_model_are_one_line(tmp_path):
    """They would be a traceback of a product, or guess words that mean others here."""
    assistant = stored("plain")
    width, rows = (assistant.model.config.text.hidden_size, assistant.model.config.text.vocab_size)
    whole = tensors_of(random_heads(width, rows, count=2))
    short = {name: tensor for name, tensor in whole.items() if name != "1.0.linear.bias"}
    cases = {
        "no heads": ({}, "holds nothing, expected heads of Medusa"),
        "width": (tensors_of(random_heads(width + 2)), f"but the model's hidden size is {width}"),
        "rows": (tensors_of(random_heads(width, rows + 9)), f"vocabulary of {rows + 9} tokens"),
        "few": (tensors_of(random_heads(width, 20)), "a vocabulary of 20 tokens, the model one of"),
        "missing": (short, "1.0.linear.bias is missing"),
        "gap": ({n.replace("1.", "2.", 1) if n[0] == "1" else n: t for n, t in whole.items()},
                "1.0.linear.bias is missing"),
        "others": (whole | {"model.norm.weight": torch.ones(3)}, "holds model.norm.weight"),
        "map": (tensors_of(random_heads(width, 2)) | {"token_map": torch.tensor([1, 10**6])},
                "token_map names tokens that the model does not have"),
    }  # fmt: skip
    for name, (tensors, message) in cases.items():
        folder = write(tmp_path / name, "medusa_lm_head.safetensors", tensors)
        with pytest.raises(ValueError, match=message) as error:
            assistant.drafts(f"medusa:{folder}")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"has no heads of Medusa; .* --learn medusa"):
        assistant.drafts(f"medusa:{REFERENCE / 'plain'}")
    with pytest.raises(FileNotFoundError, match=r"has no heads of Medusa"):
        assistant.drafts("medusa")  # beside the weights, where there are none
    with pytest.raises(FileNotFoundError, match="no such folder"):
        assistant.drafts(f"medusa:{tmp_path / 'gone'}")


# --- the answer -----------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"max_new_tokens": 7},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.4, "seed": 4, "top_k": 9, "top_p": 0.9},
]


def drafter_of(assistant, count: int = 3) -> Medusa:
    """Heads whose guesses are now and then right: the identity, which repeats what came, and random
    numbers."""
    language = assistant.model.language_model
    width = language.config.hidden_size
    tensors = tensors_of(Heads(count, width)) | {
        name: tensor for name, tensor in tensors_of(random_heads(width)).items() if name[0] == "2"
    }
    return Medusa(tensors, None, language)


@pytest.mark.parametrize(("options", "contrast"), zip(OPTIONS, cycle([None, VCD()]), strict=False))
def test_the_answer_is_the_plain_one(toy, pixels, options, contrast):
    """Heads decided what was said."""
    rows = 1 if contrast is None else 2
    spliced = toy.model.splice([IDS] * rows, pixels[:rows])
    chosen = Options(**{"max_new_tokens": 12, **options})
    given = {"tokenizer": toy.tokenizer, "contrast": contrast}
    plain = parts(steps(toy.model, spliced, chosen, **given))
    for count in (4, None):
        drafts = Drafts(drafter_of(toy), count)
        assert parts(drafts.steps(toy.model, spliced, chosen, **given)) == plain
        if len(plain) > 3 and count is not None:
            assert drafts.report.drafted > 0


class Planted:
    """A drafter whose trees hold the answer on the last of two branches, so that what comes true
    never stands where it is to stay in the cache; each fifth token is not guessed."""

    kind, cost = "planted", None

    def __init__(self, answer: list[int], vocabulary: int):
        self.answer, self.vocabulary, self.at = answer, vocabulary, 0

    def begin(self, prompt, sampler, pictures):
        self.at = 0
        return self

    def propose(self, count: int) -> Tree:
        known = self.answer[self.at : self.at + 3]
        tokens, parents, last = [], [], 0
        for depth, token in enumerate(known):
            wrong = [(token + i) % self.vocabulary for i in (1, 2)]
            right = token if (self.at + depth) % 5 else wrong[1]
            tokens += [wrong[0], right]
            parents += [last, last]
            last = len(tokens)
        return Tree(tokens, parents, [0.5] * len(tokens)).first(count)

    def accept(self, ids: list[int], hidden: torch.Tensor) -> None:
        self.at += len(ids)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("method", [None, VCD(), M3ID(rate=0.3)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_tree_gives_the_plain_steps_and_the_plain_cache(
    toy, pixels, options, method, masked, monkeypatch
):
    """A guess saw its neighbours, stood at its place in the pass instead of its depth, or stayed in
    the cache; records had the keys of the whole tree. M3ID's second row is shorter, which is
    padding. masked: with one call of attention, as on a GPU."""
    monkeypatch.setattr("minillava.generate.speculate.at_once", lambda device: masked)
    rows = [IDS, [i for i in IDS if i != -200]] if isinstance(method, M3ID) else [IDS, IDS]
    rows = rows[: 1 if method is None else 2]
    spliced = toy.model.splice(rows, pixels[: sum(row.count(-200) for row in rows)])
    length, text = spliced.embeds.shape[1], toy.model.config.text
    chosen = Options(max_new_tokens=13, min_new_tokens=13, **options)
    given = {"record": RECORDABLE, "contrast": method}

    def cache():
        return KVCache(text, len(rows), length + 13, dtype=torch.float64, device="cpu")

    filled, mine = cache(), cache()
    plain, lengths = [], []
    for step in steps(toy.model, spliced, chosen, cache=filled, **given):
        plain.append(step)
        lengths.append(filled.length)
    planted = Planted([s.ids[0] for s in plain], text.vocab_size)
    drafts = Drafts(planted, 6)
    for at, step in enumerate(drafts.steps(toy.model, spliced, chosen, cache=mine, **given)):
        other = plain[at]
        assert step.ids == other.ids
        assert mine.length == lengths[at]
        for a, b in zip([*mine.keys, *mine.values], [*filled.keys, *filled.values], strict=True):
            assert_same_in_float64(a[:, :, : mine.length], b[:, :, : mine.length])
        for name in ("logits", "scores"):
            assert_same_in_float64(vars(step)[name], vars(other)[name])
        for name in ("hidden_states", "attentions"):
            for a, b in zip(vars(step)[name], vars(other)[name], strict=True):
                assert_same_in_float64(a, b)
    assert len(plain) == 13
    assert drafts.report.accepted >= 6
    assert drafts.report.lengths[2:] != []  # whole branches, of which only every second row counts


def test_an_abandoned_tree_leaves_what_was_shown(toy, pixels):
    """Rows of a branch that came true stood behind those of another one."""
    spliced = toy.model.splice([IDS], pixels[:1])
    options, text = Options(max_new_tokens=12, min_new_tokens=12), toy.model.config.text
    plain = list(steps(toy.model, spliced, options))
    answer = [s.ids[0] for s in plain]
    for stopped in (1, 3, 4, 6):
        cache = KVCache(text, 1, spliced.embeds.shape[1] + 12, dtype=torch.float64, device="cpu")
        made = Drafts(Planted(answer, text.vocab_size), 6).steps(
            toy.model, spliced, options, cache=cache
        )
        assert [next(made).ids[0] for _ in range(stopped)] == answer[:stopped]
        made.close()
        with torch.no_grad():
            last = torch.tensor([answer[stopped - 1 : stopped]])
            logits = toy.model.language_model(last, None, cache).logits[:, -1]
        assert_same_in_float64(logits, plain[stopped].logits)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", "int8"), ("bfloat16", "int8"), ("float32", "int4")]
)
def test_a_tree_on_small_weights_gives_the_same_bits(dtype, kind):
    """Each guess is attended to as in a step of its own: one masked call for all of them would add
    up in another order."""
    assistant = stored(WEIGHTS, dtype, quantize=kind)
    spliced = assistant.prepare(WEIGHTS / "example-2.png", assistant.prompt("What is there?"))
    options = Options(max_new_tokens=16, min_new_tokens=16)
    plain = list(steps(assistant.model, spliced, options))
    planted = Planted([s.ids[0] for s in plain], assistant.model.config.text.vocab_size)
    drafts = Drafts(planted, 6)
    found = list(drafts.steps(assistant.model, spliced, options))
    assert [s.ids for s in found] == [s.ids for s in plain]
    assert drafts.report.accepted >= 6
    if SAME_ROWS.get(processor.kind(), {}).get(kind, 1) >= 7:
        assert drafts.report.exact
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(found, plain, strict=True))


def test_a_tree_in_one_call_is_not_called_exact(monkeypatch):
    """Only attention query by query was tried, and a GPU takes one call for a whole tree."""
    model = stored(WEIGHTS, "float32", quantize="int8").model
    drafts = Drafts(Planted([], model.config.text.vocab_size), 6)
    assert drafts.drafter.cost is None
    monkeypatch.setattr("minillava.generate.speculate.at_once", lambda device: True)
    assert not drafts.is_exact(model)


def test_an_end_inside_a_tree_ends_the_answer(toy, pixels):
    """What goes on from an end token was guessed, and kept."""
    end, text = toy.model.config.eos_token_ids[0], toy.model.config.text
    spliced = toy.model.splice([IDS], pixels[:1])

    def process(scores, history):
        ends = torch.full_like(scores, -torch.inf)
        ends[:, end] = 0
        return ends if history.shape[1] > spliced.embeds.shape[1] + 4 else scores

    options = Options(max_new_tokens=12)
    plain = parts(steps(toy.model, spliced, options, process=process))
    answer = [ids[0] for ids, _, _ in plain]
    assert answer[-1] == end
    made = Drafts(Planted([*answer, 7, 7], text.vocab_size), 6)
    assert parts(made.steps(toy.model, spliced, options, process=process)) == plain


def test_heads_are_for_one_answer(toy, pixels):
    """Several prompts or beams would be answered wrongly instead of being refused."""
    drafts = Drafts(drafter_of(toy))
    spliced = toy.model.splice([IDS, IDS], pixels)
    with pytest.raises(ValueError, match="2 answers at once: drafts are for one"):
        next(drafts.steps(toy.model, spliced, Options()))
    with pytest.raises(ValueError, match="num_beams is 2"):
        next(drafts.steps(toy.model, spliced, Options(num_beams=2)))


def test_generate_takes_them_too(toy, pixels):
    """`follow=` would not get the drafter's steps."""
    drafts = Drafts(drafter_of(toy), 3)
    plain = generate(toy.model, [IDS], pixels[:1], max_new_tokens=9).sequences
    found = generate(toy.model, [IDS], pixels[:1], max_new_tokens=9, follow=drafts.steps)
    assert torch.equal(found.sequences, plain)
    assert drafts.report.kind == "medusa"


# --- the tree -------------------------------------------------------------------------------------

#     ┌─ 11 ─┬─ 21 ── 31
#  0 ─┤      └─ 22
#     └─ 12
GOLDEN = Tree([11, 12, 21, 22, 31], [0, 0, 1, 1, 3], [])


def test_a_tree_by_hand():
    """Of Medusa's own buffers: positions 0 1 1 2 2 3, and the rows from the root to each leaf."""
    paths = [GOLDEN.path(row) for row in range(6)]
    assert [len(path) - 1 for path in paths] == [0, 1, 1, 2, 2, 3]
    leaves = [path for path in paths if path[-1] not in GOLDEN.parents]
    assert sorted(leaves, key=len, reverse=True) == [[0, 1, 3, 5], [0, 1, 4], [0, 2]]
    positions, mask = positions_and_mask(GOLDEN, 2, None, torch.device("cpu"))
    assert positions.tolist() == [[2, 3, 3, 4, 4, 5]]
    shown = ["".join(".x"[seen] for seen in row) for row in mask[0, 0].int().tolist()]
    assert shown == ["xxx.....", "xxxx....", "xxx.x...", "xxxx.x..", "xxxx..x.", "xxxx.x.x"]
    padding = torch.tensor([[False, True, True], [True, True, True]])
    positions, mask = positions_and_mask(GOLDEN, 2, padding, torch.device("cpu"))
    assert positions.tolist() == [[1, 2, 2, 3, 3, 4], [2, 3, 3, 4, 4, 5]]
    assert mask.shape == (2, 1, 6, 8)
    assert mask[:, 0, 3, :2].tolist() == [[False, True], [True, True]]


def test_a_child_is_found_by_its_token():
    """The same token at another place of the tree was taken for the one that follows."""
    assert [GOLDEN.child(0, token) for token in (11, 12, 21)] == [1, 2, None]
    assert [GOLDEN.child(1, token) for token in (21, 22, 11)] == [3, 4, None]
    assert GOLDEN.as_chain() == chain([11, 21, 31])
    assert not GOLDEN.is_chain and chain([5, 6]).is_chain and chain([]).is_chain


def test_what_may_not_be_guessed_takes_what_follows_it_along():
    """A guess that goes on from a refused one would go on from another."""
    kept = GOLDEN.without(lambda token: token == 21, {12})
    assert kept == Tree([11, 12, 22], [0, 0, 1], [])
    ends = Tree([2, 7, 8, 9], [0, 1, 0, 3], [0.4, 0.3, 0.2, 0.1])
    assert ends.without(lambda token: False, {2}) == Tree([2, 8, 9], [0, 0, 2], [0.4, 0.2, 0.1])


def test_the_most_likely_guesses_come_first_and_every_beginning_is_a_tree():
    """A guess without the one it goes on from has no place in a pass."""
    found = most_likely([[5, 6], [7, 8], [9, 9]], [[0.6, 0.3], [0.5, 0.4], [0.9, 0.05]], 7)
    assert found.tokens == [5, 6, 7, 9, 8, 9, 7]
    assert found.parents == [0, 0, 1, 3, 1, 5, 2]
    assert found.chances == pytest.approx([0.6, 0.3, 0.3, 0.27, 0.24, 0.216, 0.15])
    random = torch.Generator().manual_seed(0)
    for _ in range(30):
        best = torch.rand(4, 40, generator=random).softmax(-1).topk(10).values.tolist()
        tree = most_likely([list(range(10))] * 4, best, 63)
        assert all(parent <= i for i, parent in enumerate(tree.parents))
        assert tree.chances == sorted(tree.chances, reverse=True)
        assert most_likely([list(range(10))] * 4, best, 20) == tree.first(20)
    one = most_likely([[5], [6], [7]], [[0.5], [0.5], [0.5]], 9)
    assert one.is_chain and one.tokens == [5, 6, 7]


def test_as_many_of_a_tree_as_pay():
    """Guesses that are never right would be checked on and on, or right ones never."""
    tree = most_likely([[5, 6], [7, 8]], [[0.6, 0.3], [0.5, 0.4]], 6)
    assert len(Pace(None, lambda rows: 1.0, None).cut(tree).tokens) == 6
    assert Pace(None, float, None).cut(tree).tokens == []
    # by hand, of (1 + sum of chances) / (1 + n/3): 1, 1.2, 1.14, ...
    pace = Pace(None, lambda rows: 1 + (rows - 1) / 3, None)
    assert pace.cut(tree).tokens == [5]
    assert pace.choose() == MOST
    for _ in range(32):
        pace.note(tree, 0)
    assert pace.cut(tree).tokens == []
    for _ in range(32):
        pace.note(tree.first(1), 1)
    assert pace.cut(tree).tokens == [5]
    assert Pace(3, float, None).cut(tree) == tree  # as many as were asked for


# --- the bundled heads ----------------------------------------------------------------------------


def test_the_bundled_heads_save_passes_and_change_nothing():
    """They would be those of another training, and cost passes instead of saving them."""
    assert (WEIGHTS / "medusa_lm_head.safetensors").stat().st_size < 1e6
    assistant = stored(WEIGHTS)
    tokens, passes = 0, {1: 0, 10: 0}
    for i, question in enumerate(("Describe this image.", "How many shapes are there?", "What?")):
        picture = WEIGHTS / f"example-{i + 1}.png"
        expected = assistant.ask(picture, question)
        opened = assistant.drafts("medusa").drafter
        for ranks in passes:
            drafter = Medusa(tensors_of(opened.heads), None, opened.language, ranks)
            drafts = Drafts(drafter, 7)
            assert assistant.ask(picture, question, draft=drafts) == expected
            passes[ranks] += drafts.report.passes
        tokens += drafts.report.tokens - 1
    assert tokens / passes[1] >= 1.5  # a chain
    assert passes[10] <= passes[1]  # and a tree, which holds more


def test_same_bits_take_the_first_branch(monkeypatch):
    """Rows that are read one after the other cannot be a tree."""
    assistant = stored(WEIGHTS)
    expected = assistant.ask(WEIGHTS / "example-2.png", "Describe this image.")
    monkeypatch.setattr(assistant.model.language_model, "one_by_one", True)
    drafts = assistant.drafts("medusa", 7)
    assert (
        assistant.ask(WEIGHTS / "example-2.png", "Describe this image.", draft=drafts) == expected
    )
    assert drafts.report.accepted > 0
