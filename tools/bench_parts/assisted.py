"""assisted: a small model guesses for a large one, in minillava and in transformers, with the same
weights and as many guesses.

The large model is random, but the layers above its first ones add nothing. So a model of these
first layers and the same head, a true small model by its cost, guesses right each time: what is
compared is what the two programs make of it.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench_parts.clock import Timing, take_turns
from bench_parts.growth import random_model
from minillava.fast.linear import use_fast_linear
from minillava.generate.draft_model import DraftModel
from minillava.generate.speculate import Drafts
from minillava.llama import LanguageModel
from minillava.llava import Llava
from minillava.loop import steps
from minillava.options import Options

SHALLOW = 2  # layers of the small model
GUESSES = 4


def assisted(
    size: str, dtype: torch.dtype, prompt: int, tokens: int, rounds: int
) -> tuple[dict[str, Timing], dict[str, list[int]]]:
    """Seconds per token after the first, and the ids; plain and assisted answers of both take
    turns."""
    model = random_model(size, dtype)
    for layer in model.language_model.layers[SHALLOW:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    small = first_layers(model.language_model)
    text = model.config.text
    ids = torch.randint(5, text.vocab_size, (prompt,), generator=torch.Generator().manual_seed(1))
    drafts = Drafts(DraftModel(small, model.language_model), GUESSES)
    made: dict[str, list[int]] = {}
    theirs = {"": theirs_of(model.language_model), "assisted": theirs_of(small)}
    variants: dict[str, Callable[[], float]] = {
        "minillava": partial(ours, made, "minillava", steps, model, ids, tokens),
        "minillava, draft": partial(
            ours, made, "minillava, draft", drafts.steps, model, ids, tokens
        ),
        "transformers": partial(transformers, made, "transformers", theirs, ids, tokens),
        "transformers, assisted": partial(
            transformers, made, "transformers, assisted", theirs, ids, tokens
        ),
    }
    return take_turns(variants, rounds), made


def first_layers(language: LanguageModel) -> LanguageModel:
    """The same tensors, fewer layers."""
    with torch.device("meta"):
        config = replace(language.config, num_hidden_layers=SHALLOW)
        small = LanguageModel(config, language.attend)
    kept = language.state_dict()
    small.load_state_dict({name: kept[name] for name in small.state_dict()}, assign=True)
    use_fast_linear(small)
    return small.requires_grad_(False)


def theirs_of(language: LanguageModel):
    """A Llama of transformers with the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    names += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    settings = {name: getattr(language.config, name) for name in [*names, "rms_norm_eps"]}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    state = language.state_dict()
    model.load_state_dict(
        {n if n.startswith("lm_head") else f"model.{n}": t for n, t in state.items()},
        strict=True,
        assign=True,
    )
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


def ours(
    made: dict[str, list[int]], name: str, way: Callable, model: Llava, ids: Tensor, tokens: int
) -> float:
    options = Options(max_new_tokens=tokens + 1, min_new_tokens=tokens + 1)
    spliced, times, found = model.splice([ids.tolist()], None), [], []
    for step in way(model, spliced, options):
        times.append(time.perf_counter())
        found += step.ids
    made[name] = found
    return (times[-1] - times[0]) / tokens


class Clock:
    """A streamer of transformers: when how many tokens came, the prompt's first."""

    def __init__(self):
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing is left to do."""


@torch.no_grad()
def transformers(
    made: dict[str, list[int]], name: str, theirs: dict, ids: Tensor, tokens: int
) -> float:
    settings: dict = {}
    if name.endswith("assisted"):
        small = theirs["assisted"]
        small.generation_config.num_assistant_tokens = GUESSES
        small.generation_config.num_assistant_tokens_schedule = "constant"
        small.generation_config.assistant_confidence_threshold = 0.0
        settings["assistant_model"] = small
    clock = Clock()
    found = theirs[""].generate(
        ids[None], attention_mask=torch.ones_like(ids[None]), do_sample=False, streamer=clock,
        max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, pad_token_id=0, **settings,
    )  # fmt: skip
    made[name] = found[0, len(ids) :].tolist()
    return (clock.times[-1] - clock.times[1]) / sum(clock.counts[2:])


def assisted_table(timings: dict[str, Timing], made: dict[str, list[int]]) -> str:
    lines = [
        f"| {GUESSES} guesses a pass, all right | tokens/s | spread | to the plain one | others |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, timing in timings.items():
        plain = timings[name.partition(",")[0]]
        other = max(timing.others)
        lines.append(
            f"| {name} | {1 / timing.median:.2f} | ±{timing.spread:.0%} | "
            f"{plain.median / timing.median:.2f} | {other:.2f} |"
        )
    first = next(iter(made.values()))
    same = all(ids == first for ids in made.values())
    return "\n".join([*lines, "", "All ids are the same." if same else "The ids differ."])
