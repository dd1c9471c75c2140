"""Speculative decoding: a drafter guesses the next tokens, and one pass checks all its guesses.

A pass over the last token and g guesses gives the logits of g + 1 steps, and reads the weights once
(Leviathan et al. 2023). Each row of the pass then goes through the same objects as a plain step,
one after the other: a token is chosen, it may end the answer, its text is shown. The first row
whose token differs from the guess is the last one that counts. So a draft decides nothing and only
saves passes, and the answer is the plain one: the most likely tokens, or, since each token is drawn
with the same random numbers, the same sample for the same seed (Daliri et al. 2024). Accepting with
probability min(1, p/q), as in the first paper, would keep a few more guesses, but not the sample.

B rows (2 with contrast, else 1), g guesses, S positions in the cache, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from minillava.attention import eager
from minillava.cache import KVCache
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.generate.tree import Tree, along_paths, chain, positions_and_mask
from minillava.generate.watch import Watch
from minillava.llama import Context, LanguageModel, LanguageOutput, rotary_tables
from minillava.llava import Llava, Spliced
from minillava.loop import decode_in_turn, prefill, steps
from minillava.options import DRAFT_TOKENS, Options
from minillava.sampling import Sampler
from minillava.streaming import Run, Step

NOTICED = 64
"""After so many guesses without a right one, something may be wrong."""

MOST = 15
"""Guesses in a pass, at most, where their number is chosen by what they cost."""

LOSS, CREDIT = 0.02, 1.25
"""How much longer an answer may take with guesses that are never right: a part of it, and steps, as
many as it takes to try some."""


EXACT = {True: ", exact on this machine", False: ", exact up to rounding", None: ""}
"""In words, whether a pass has the bits of single steps."""


class Draft(Protocol):
    """The guesses for one answer."""

    def propose(self, count: int) -> list[int] | Tree:
        """At most `count` tokens that may come next, one after the other or as a tree; without any,
        the step is an ordinary one."""

    def accept(self, ids: list[int], hidden: Tensor) -> None:
        """Learn the tokens that really came. hidden [C]: the last hidden state, normalised, from
        which the last of `ids` was chosen."""


def fork(sampler: Sampler) -> Sampler:
    """A copy of a sampler, to guess with: it draws what the original will draw, and does not change
    the original. It has no `process`, since the caller's function must not be called for
    guesses."""
    other = copy(sampler)
    other.process, other.generators = None, []
    for generator in sampler.generators:
        twin = torch.Generator(device=generator.device)
        other.generators.append(twin.set_state(generator.get_state()))
    return other


class Drafter(Protocol):
    """A way to guess. A file that defines these names adds a new one."""

    kind: str  # its name

    @property
    def cost(self) -> float | None:
        """Of one guess, in steps of the model; None: they come at once, as a Tree with chances."""

    def begin(self, prompt: list[int], sampler: Sampler, pictures: Sequence[Any]) -> Draft:
        """Start the guesses for one answer. prompt: ids with -200 for each picture. sampler: of the
        answer; a `fork` of it chooses as it will. pictures: as they were given; none if only their
        patches are known."""


@dataclass
class Report:
    """How much one answer gained from its drafts."""

    kind: str
    exact: bool | None = None  # whether rows of a pass have the bits of single steps; None: unknown
    tokens: int = 0  # of the answer
    passes: int = 0  # after the prompt's
    drafted: int = 0
    accepted: int = 0
    lengths: list[int] = field(default_factory=list)  # in how many passes n guesses were right
    guessed: list[bool] = field(default_factory=list)  # of each token, whether it was guessed
    guesses: list[int] = field(default_factory=list)  # that the last pass checked
    right: list[int] = field(default_factory=list)  # which of these, by their places

    def add(self, guesses: list[int], right: list[int], made: int) -> bool:
        """Add a pass that made so many tokens; returns whether it is counted: that over the prompt
        is not. right: which guesses were, by their places."""
        counted, accepted = self.tokens > 0, len(right)
        self.tokens, self.guesses, self.right = self.tokens + made, guesses, right
        self.guessed += [True] * accepted + [False] * (made - accepted)
        if counted:
            self.passes, self.drafted = self.passes + 1, self.drafted + len(guesses)
            self.accepted += accepted
            self.lengths += [0] * (accepted + 1 - len(self.lengths))
            self.lengths[accepted] += 1
        return counted

    def record(self) -> dict[str, Any]:
        """The report's fields, for --json."""
        names = ("kind", "passes", "drafted", "accepted", "lengths", "exact")
        return {name: vars(self)[name] for name in names}

    def told(self) -> str:
        """The report in words."""
        made = self.tokens - 1
        speed = f" ({made / self.passes:.1f} a pass)" if self.passes else ""
        lengths = " ".join(f"{n}:{count}" for n, count in enumerate(self.lengths) if count)
        wrong = "; not one was right: do they come from a model like this?"
        return (
            f"{self.kind}: {self.tokens} tokens, 1 from the prompt, {made} in {self.passes} passes"
            f"{speed}; drafted {self.drafted}, accepted {self.accepted}; accepted lengths: "
            f"{lengths or 'none'}{EXACT[self.exact]}"
            f"{wrong if self.drafted >= NOTICED and not self.accepted else ''}"
        )


class Pace:
    """How many tokens to guess: `fixed`, or as many as pay off, given the cost of a pass and how
    often recent guesses were right."""

    def __init__(
        self, fixed: int | None, pass_cost: Callable[[int], float], guess_cost: float | None
    ):
        """pass_cost: number of tokens -> cost of a pass, in steps. guess_cost: of one guess, in
        steps; None: guesses come with their chances."""
        self.fixed, self.guess_cost = fixed, guess_cost
        self.pass_cost = lru_cache(pass_cost)  # asked for every length before every pass
        # One right and one wrong guess to begin with: so few that a drafter that is always wrong is
        # found out after a few passes.
        self.right: deque[bool] = deque([True, False], maxlen=32)
        # of trees: how many guesses were to come true by their chances, and how many did
        self.hoped: deque[tuple[float, int]] = deque(maxlen=32)
        self.credit = CREDIT  # how many steps the next guesses may cost in vain

    def choose(self) -> int:
        if self.fixed is not None:
            return self.fixed
        if self.guess_cost is None:
            return MOST
        rate = sum(self.right) / len(self.right)
        return best_length(rate, self.pass_cost, self.guess_cost, self.credit)

    def pay(self, guesses: int, made: int) -> None:
        """Account for a pass over so many guesses that made so many tokens. So an answer takes at
        most LOSS longer than without guesses, and CREDIT, if the costs are true."""
        cost = extra(guesses, self.pass_cost, self.guess_cost or 0.0)
        self.credit += (1 + LOSS) * made - 1 - cost

    def cut(self, tree: Tree) -> Tree:
        """The first guesses of a tree, as many as pay off. Their chances are lowered if in recent
        passes fewer guesses came true than their chances said."""
        if self.fixed is not None or self.guess_cost is not None:
            return tree
        # both begin at 1, so that the first passes are trusted
        hoped, came = (1 + sum(each) for each in zip((0, 0), *self.hoped, strict=True))
        trust = min(1.0, came / hoped)

        def gain(n: int) -> float:
            return (1 + trust * sum(tree.chances[:n])) / self.pass_cost(n + 1)

        lengths = affordable(len(tree.tokens), self.pass_cost, 0.0, self.credit)
        return tree.first(max(lengths, key=gain))

    def note(self, tree: Tree, accepted: int) -> None:
        """Note how many guesses were right. A guess after a wrong one does not count."""
        if tree.chances:
            self.hoped.append((sum(tree.chances), accepted))
        else:
            self.right += [True] * accepted + [False] * (accepted < len(tree.tokens))


def best_length(
    rate: float,
    pass_cost: Callable[[int], float],
    guess_cost: float,
    credit: float = math.inf,
) -> int:
    """The number of guesses that gives the most tokens per time, if each guess is right at this
    rate. 0 is an ordinary step. credit: how many steps they may cost in vain."""

    def gain(g: int) -> float:
        expected = sum(rate**i for i in range(g + 1))  # tokens
        return expected / (1 + extra(g, pass_cost, guess_cost))

    return max(affordable(MOST, pass_cost, guess_cost, credit), key=gain)


def affordable(
    most: int, pass_cost: Callable[[int], float], guess_cost: float, credit: float
) -> list[int]:
    """How many guesses may be made: 0, and what does not cost more steps in vain than `credit`."""
    return [g for g in range(most + 1) if not g or extra(g, pass_cost, guess_cost) <= credit]


def extra(guesses: int, pass_cost: Callable[[int], float], guess_cost: float) -> float:
    """How many steps so many guesses cost beside the step that is taken anyway."""
    return pass_cost(guesses + 1) / pass_cost(1) - 1 + guesses * guess_cost


@dataclass
class Drafts:
    """A drafter and how it is used: `steps` replaces loop.steps. tokens: guesses in a pass; None:
    as many as pay off."""

    drafter: Drafter
    tokens: int | None = None
    pass_cost: Callable[[int], float] = lambda rows: 1.0  # of so many rows, in steps of one row
    exact: dict[int, bool] = field(default_factory=dict)  # by streams, from the first answer on
    report: Report | None = None  # of the answer that began last

    def __post_init__(self) -> None:
        if not hasattr(self.drafter, "begin") or isinstance(self.drafter, type):
            raise ValueError(
                f"draft is {self.drafter!r}, expected a name or a drafter, such as Lookup()"
            )
        if self.tokens is not None and (
            type(self.tokens) is not int or not 1 <= self.tokens <= DRAFT_TOKENS
        ):
            raise ValueError(
                f"tokens of a draft are {self.tokens!r}, expected a whole number from 1 to "
                f"{DRAFT_TOKENS}, or auto"
            )

    def steps(
        self,
        model: Llava,
        spliced: Spliced,
        options: Options,
        *,
        pictures: Sequence[Any] = (),
        **rest: Any,
    ) -> Iterator[Step]:
        """`loop.steps` for one prompt, the same Steps in fewer passes. Raises ValueError for
        several."""
        exact = self.is_exact(model, 1 if rest.get("contrast") is None else 2)
        self.report = Report(self.drafter.kind, exact)
        return _steps(self, self.report, model, spliced, options, pictures, **rest)

    def is_exact(self, model: Llava, streams: int = 1) -> bool:
        """Whether a pass has the bits of single steps; tried once. streams: 2 with contrast. A
        tree whose rows share one call of attention has others."""
        if self.drafter.cost is None and at_once(model.language_model.embed_tokens.weight.device):
            return False
        if streams not in self.exact:
            most = 1 + (self.tokens or MOST)
            self.exact[streams] = keeps_bits(model.language_model, most, streams)
        return self.exact[streams]

    @property
    def sees(self) -> bool:
        """Whether the drafter makes use of the pictures."""
        return getattr(self.drafter, "see", None) is not None

    def right(self, number: int) -> bool:
        """Whether token `number` of the answer that began last, from 0, was guessed."""
        return self.report is not None and self.report.guessed[number]


def following(
    drafts: Drafts | None, options: Options, pictures: Sequence[Any]
) -> Callable[..., Iterator[Step]]:
    """The loop, plain or with drafts. Raises ValueError for options that drafts do not support."""
    if drafts is None:
        return steps
    check_one(1, options)
    return partial(drafts.steps, pictures=pictures)


@torch.no_grad()
def _steps(
    drafts: Drafts,
    report: Report,
    model: Llava,
    spliced: Spliced,
    options: Options,
    pictures: Sequence[Any],
    cache: KVCache | None = None,
    **asked: Any,
) -> Iterator[Step]:
    run = Run(model, spliced, options, cache=cache, **asked)
    check_one(run.batch, options)
    with decode_in_turn(model, spliced.embeds, run.capacity, cache, run.wanted) as decoder:
        # A cache that the caller owns may grow at the last yield of a block.
        cache, spare = decoder.cache, int(cache is not None)
        rows = [prefill(model, spliced, cache, **run.wanted)]
        draft = drafts.drafter.begin(prompt_ids(spliced), run.sampler, pictures)
        guesses = Guessing(drafts, model, report, draft, run.rows_per_answer)
        while True:
            block, path = take_rows(run, rows, guesses.tree)
            ids = [step.ids[0] for step in block]
            guesses.note(path, ids)
            settle(cache, guesses.tree, path, len(ids))
            yield from show(block, cache)
            if block[-1].finish_reason[0] is not None:
                return
            draft.accept(ids, rows[path[len(block) - 1]].hidden[0, -1])
            # More guesses than tokens are left could not count.
            most = min(run.most - run.sampler.chosen, cache.capacity - cache.length - spare) - 1
            tree = guesses.guess(most)
            rows = check(model, ids[-1], tree, cache, run.rows_per_answer, **run.wanted)


class Guessing:
    """The guesses for one answer: what the next pass checks, as much as pays off, and what came of
    it. The loop of one answer and the engine (engine.py) both use it."""

    def __init__(
        self, drafts: Drafts, model: Llava, report: Report, draft: Draft, rows_per_answer: int = 1
    ):
        """report: to which passes are added. rows_per_answer: 2 with contrast."""
        self.model, self.report, self.draft = model, report, draft
        self.pace = Pace(
            drafts.tokens,
            lambda count: drafts.pass_cost(count * rows_per_answer),
            drafts.drafter.cost,
        )
        # watched: a guess that no pass checks, made to know how often they are right
        self.tree = self.watched = chain([])

    def guess(self, most: int, as_chain: bool = False) -> Tree:
        """The guesses that the next pass checks, at most so many. as_chain: one after the other."""
        self.tree, self.watched = guess(self.draft, self.pace, most, self.model, as_chain)
        return self.tree

    def skip(self) -> Tree:
        """No guesses: the next pass is an ordinary step."""
        self.tree = self.watched = chain([])
        return self.tree

    def note(self, path: list[int], ids: list[int]) -> None:
        """Note what a pass made: the rows that `follow` found, and the tokens."""
        if self.report.add(self.tree.tokens, [row - 1 for row in path[1:]], len(ids)):
            self.pace.pay(len(self.tree.tokens), len(ids))
            self.pace.note(self.tree, len(path) - 1)
            self.pace.note(self.watched, int(self.watched.tokens == ids[:1]))


def guess(
    draft: Draft, pace: Pace, most: int, model: Llava, as_chain: bool = False
) -> tuple[Tree, Tree]:
    """The guesses that the next pass checks, at most so many, and one that is only watched, if none
    is checked and it costs nothing. as_chain: one after the other."""
    none, count = chain([]), min(pace.choose(), most)
    if count <= 0 and pace.guess_cost != 0:
        return none, none
    found = draft.propose(max(count, 1))
    found = found if isinstance(found, Tree) else chain(found)
    found = text_only(found.first(max(count, 1)), model)
    if as_chain or model.language_model.one_by_one:
        found = found.as_chain()
    tree = pace.cut(found) if count > 0 else none
    return tree, none if tree.tokens else found.first(1)


def follow(tree: Tree, choose: Callable[[int], tuple[int, bool]]) -> list[int]:
    """Go from row to row of a pass as long as a guess is the token that is chosen, and does not end
    the answer. choose: of a row, the token and whether it is the last. Returns the rows of the last
    token that was read and of the guesses that were right."""
    path = [0]
    while True:
        token, ended = choose(path[-1])
        right = tree.child(path[-1], token)
        path += [] if right is None else [right]
        if ended or right is None:
            return path


def take_rows(run: Run, rows: list[LanguageOutput], tree: Tree) -> tuple[list[Step], list[int]]:
    """The steps that a pass yields, and the rows that `follow` finds."""
    block: list[Step] = []

    def choose(row: int) -> tuple[int, bool]:
        step, told = run.choose(rows[row])
        run.tell(step, told.tolist())
        block.append(step)
        return step.ids[0], step.finish_reason[0] is not None

    return block, follow(tree, choose)


def settle(cache: KVCache, tree: Tree, path: list[int], made: int) -> None:
    """Leave in the cache, of a pass that made so many tokens, what it read of them: all but the
    last, which was chosen just now."""
    before = cache.length - len(tree.tokens) - 1
    if tree.is_chain:
        cache.truncate(before + made)
    else:
        cache.keep([before + row for row in path[:made]])


def show(block: list[Step], cache: KVCache) -> Iterator[Step]:
    """Yield step by step, with the cache after each as the plain loop would leave it, so that a
    caller that stops early can go on from it."""
    cache.truncate(cache.length - len(block) + 1)
    for step in block:
        yield step
        if step is not block[-1]:
            cache.advance(1)  # it was read already


def check(
    model: Llava,
    last: int,
    tree: Tree,
    cache: KVCache,
    rows_per_answer: int = 1,
    watches: Sequence[Watch] = (),
    **wanted: bool,
) -> list[LanguageOutput]:
    """One pass over the last token and guesses; returns what a single step would give for each of
    them. Both streams of contrast read the same tokens. watches: of the rows of a chain, if their
    attention is noted. wanted: hidden_states, attentions."""
    language, past = model.language_model, cache.length
    rows = [[last, *tree.tokens]] * rows_per_answer
    ids = torch.tensor(rows, device=language.embed_tokens.weight.device)  # [B, g + 1]
    if language.one_by_one:
        return one_by_one(language, ids, cache, watches, **wanted)
    recorded, padded = wanted.get("attentions", False), cache.padding_mask is not None
    attend = eager if recorded else language.attend
    seen: list[slice | list[int]] = [slice(0, past + i + 1) for i in range(ids.shape[1])]
    if tree.is_chain:
        together = None if recorded or watches else language.each_alone
        attend = query_by_query(attend, together, padded, watches)
        output = language(ids, None, cache, attend=attend, **wanted)
    else:
        paths = [tree.path(i) for i in range(ids.shape[1])]
        positions, mask = positions_and_mask(tree, past, cache.padding_mask, ids.device)
        if at_once(ids.device):
            seen = [[*range(past), *(past + row for row in path)] for path in paths]
        else:
            seen = [slice(0, past + len(path)) for path in paths]
            attend = along_paths(attend, tree, padded)
        output = language(ids, None, cache, attend=attend, positions=positions, mask=mask, **wanted)
    return [one_row(output, i, keys) for i, keys in enumerate(seen)]


def one_by_one(
    language: LanguageModel, ids: Tensor, cache: KVCache, watches: Sequence[Watch], **wanted: bool
) -> list[LanguageOutput]:
    """The same for a model that reads each token in a step of its own. ids [B, g + 1]"""
    attends = [watch.over(language.attend) for watch in watches] or [None] * ids.shape[1]
    tokens = zip(ids.split(1, dim=1), attends, strict=True)
    return [language(each, None, cache, attend=attend, **wanted) for each, attend in tokens]


def at_once(device: torch.device) -> bool:
    """Whether a tree is one call of attention with its mask: on a GPU a call for each guess would
    take longer than the rest of the pass."""
    return device.type != "cpu"


def one_row(output: LanguageOutput, i: int, keys: slice | list[int]) -> LanguageOutput:
    """Row i of a pass, which saw these keys, as a step of its own."""
    states, weights, row = output.hidden_states, output.attentions, slice(i, i + 1)
    return LanguageOutput(
        output.logits[:, row],
        None if states is None else tuple(state[:, row] for state in states),
        None if weights is None else tuple(w[:, :, row, keys] for w in weights),
        output.hidden[:, row],
    )


def query_by_query(
    attend: Callable[..., Any],
    each_alone: Callable[..., Any] | None,
    padded: bool,
    watches: Sequence[Watch] = (),
) -> Callable[..., Any]:
    """Attention of several new positions as if each were a step: the same call as in a step, with
    one query over the keys that it would see. One call for all of them would add up in another
    order, and in int8, int4 and bfloat16 that is the only difference from single steps. each_alone:
    of LanguageModel. watches: of each query, if it is noted what it sees."""
    attends = [watch.over(attend) for watch in watches]
    # unlike a closure, this can be sent to another process
    return partial(_attend_rows, attends or attend, each_alone, padded)


def _attend_rows(
    attends: Callable[..., Any] | Sequence[Callable[..., Any]],
    each_alone: Callable[..., Any] | None,
    padded: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    mask = mask if padded else None
    together = None if each_alone is None else each_alone(q, k, v, mask)
    if together is not None:
        return together, None
    count, keys = q.shape[2], k.shape[2]
    outs, weights = [], []
    for i in range(count):
        row, seen = slice(i, i + 1), slice(0, keys - count + i + 1)
        hidden = None if mask is None else mask[:, :, row, seen]
        attend = attends if callable(attends) else attends[i]
        out, w = attend(q[:, :, row], k[:, :, seen], v[:, :, seen], hidden, False)
        outs.append(out)
        if w is not None:
            weights.append(torch.nn.functional.pad(w, (0, keys - w.shape[-1])))
    return torch.cat(outs, dim=2), torch.cat(weights, dim=2) if weights else None


@torch.no_grad()
def keeps_bits(language: LanguageModel, most: int, streams: int = 1) -> bool:
    """Whether the rows of a pass over up to `most` tokens have the bits of single steps on this
    machine. It tries the first block and the head, which have layers of all shapes. A difference
    would come from the order in which a product of several rows adds up. streams: 2 with
    contrast."""
    if language.one_by_one:
        return True
    if language.alike is not None and streams * most > language.alike:
        return False  # one trial may have the same bits by luck
    weight = language.embed_tokens.weight
    config = replace(language.config, num_hidden_layers=1)
    attend = query_by_query(language.attend, language.each_alone, padded=False)
    context = Context(*[None] * 4, attend, None)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (streams, most), generator=random).to(weight.device)

    def logits(*counts: int) -> Tensor:
        cache = KVCache(config, streams, most, dtype=weight.dtype, device=weight.device)
        found = []
        for count in counts:
            start, end = cache.length, cache.length + count
            positions = torch.arange(start, end, device=weight.device)[None]
            cos, sin = rotary_tables(positions, config, weight.dtype)
            now = context._replace(cos=cos, sin=sin, causal=False, cache=cache)
            x, _ = language.layers[0](language.embed_tokens(ids[:, start:end]), now)
            cache.advance(count)
            found.append(language.head(language.norm(x)))
        return torch.cat(found, dim=1)

    single = logits(*[1] * most)  # [streams, most, V]
    counts = {count for count in (2, 3, 4, 8, 16, most) if count <= most}
    return all(torch.equal(logits(count), single[:, :count]) for count in counts)


def prompt_ids(spliced: Spliced) -> list[int]:
    """The ids of a prompt, -200 for each picture."""
    ids = spliced.token_ids[0].tolist()
    for start, end in reversed(spliced.image_spans[0]):
        ids[start:end] = [IMAGE_TOKEN_INDEX]
    padding = 0 if spliced.padding_mask is None else int((~spliced.padding_mask[0]).sum())
    return ids[padding:]


def text_only(tree: Tree, model: Llava) -> Tree:
    """The guesses without any that the model cannot generate: a picture, padding, or an id outside
    its vocabulary; and without what goes on from those, or from an end."""
    config = model.config

    def refused(token: int) -> bool:
        picture = token in (IMAGE_TOKEN_INDEX, config.image_token_id)
        return picture or not 0 <= token < config.text.vocab_size or token == config.pad_token_id

    return tree.without(refused, config.eos_token_ids)


def check_one(batch: int, options: Options) -> None:
    """Raises ValueError for options that drafts do not support."""
    if options.num_beams > 1:
        raise ValueError(f"num_beams is {options.num_beams}: drafts are for single answers")
    if batch > 1:
        raise ValueError(
            f"{batch} answers at once: drafts are for one, since each accepts another number of "
            "tokens; ask one after the other, or leave draft out"
        )
