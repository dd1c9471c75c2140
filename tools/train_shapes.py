#!/usr/bin/env python3
"""Train the bundled model from nothing: the recipe of LLaVA in miniature, in an hour and a half on
two CPU cores.

    python tools/train_shapes.py --out my-shapes

    tokenizer  a SentencePiece vocabulary of the captions and questions
    1 see      the vision tower learns to see: every patch names what its ninth of the picture holds. (For LLaVA,
               OpenAI had done this when it trained CLIP.)
    2 read     the language model learns the language: it answers questions about a written description. (Vicuna.)
    3 align    the projector alone learns to put a picture where the description stood. (LLaVA, stage 1.)
    4 answer   projector and language model learn from the answers alone. (LLaVA, stage 2, visual instruction tuning.
               As in the paper, the vision tower stays as it is.)

Killed, it goes on from its last checkpoint when started again; finished, it says so and leaves the
model as it is. A batch is a function of (seed, stage, step, worker), so the same seed and --workers
give the same weights on the same kind of machine.

B pictures, P patches, N conversations, S tokens before and T tokens after their picture, C width.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import io
import json
import math
import random
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shapes

from minillava.attention import eager
from minillava.cli.arguments import Parser
from minillava.cli.messages import run
from minillava.config import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlavaConfig, TextConfig, VisionConfig
from minillava.fast.processor import has_fast_bfloat16
from minillava.image import CLIP_MEAN, CLIP_STD, ImageProcessor
from minillava.labels import encode_answers
from minillava.llama import Context, rotary_tables
from minillava.llava import Llava
from minillava.prompt import Prompt, Segment, place_images
from minillava.templates import DEFAULT_TEMPLATE, TEMPLATES
from minillava.tokenizer import Tokenizer

try:
    from tqdm import tqdm
except ImportError:
    sys.exit(
        "train_shapes.py shows its progress with tqdm: pip install 'minillava[tools]' (or pip "
        "install tqdm)"
    )

VISION = VisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,  # of which LLaVA uses five: its features are those of layer -2
    num_attention_heads=6,
    image_size=126,  # 9 x 9 patches: three by three for each ninth of a square picture
    patch_size=14,
)
TEXT = TextConfig(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)
MAX_PIECES = 638
TEMPLATE = TEMPLATES[DEFAULT_TEMPLATE]


@dataclass(frozen=True)
class Stage:
    """steps: optimiser steps. pictures: per step, over all workers. rate: Muon's; AdamW's is a
    tenth of it. cooldown: over this last part of the steps the rate falls to zero."""

    name: str
    steps: int
    pictures: int
    rate: float
    cooldown: float


STAGES = (
    Stage("see", 1200, 48, 0.02, 0.5),
    Stage("read", 200, 32, 0.02, 0.5),
    Stage("align", 100, 32, 0.02, 0.5),
    Stage("answer", 2600, 32, 0.01, 0.3),
)
QUESTIONS = 8  # per picture
BUCKETS = 4  # conversations of a step are sorted by length into so many batches
WARMUP = 100  # steps until the full rate
SAVE_EVERY = 100  # steps
CHECKPOINT = "training.pt"
FINISHED = "config.json"
"""What a folder has besides, once training has ended."""


# ---------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(path: Path, seed: int, scenes: int) -> None:
    """A Llama-style SentencePiece model of the conversations' text, and the file that says how to
    use it."""
    rng = random.Random(f"{seed}/tokenizer")
    lines = [TEMPLATE.system] * scenes
    for _ in range(scenes):
        scene = shapes.sample_scene(rng)
        for dialogue in shapes.ask_any(scene, QUESTIONS, rng):
            lines += [
                f"USER: {question} ASSISTANT: {answer}" for question, answer in dialogue.turns
            ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,  # a path would be written into the model
        vocab_size=MAX_PIECES,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    write_json({"legacy": True, **TOKENIZER_CONFIG}, path.with_name("tokenizer_config.json"))


def model_config(pieces: int) -> LlavaConfig:
    """The ids as on the hub: `<image>` and `<pad>` follow the pieces, and the table is padded to a
    multiple of 64."""
    text = TextConfig(**{**asdict(TEXT), "vocab_size": math.ceil((pieces + 2) / 64) * 64})
    return LlavaConfig(vision=VISION, text=text, image_token_id=pieces, pad_token_id=pieces + 1)


# ---------------------------------------------------------------------------------- initial weights


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Random matrices that keep a vector's length, except that each block starts close to passing
    its input on."""
    for name, p in model.named_parameters():
        if name.endswith("position_embedding.weight"):
            p.data.copy_(plane_waves(len(p) - 1, p.shape[1]))
        elif p.dim() > 1:
            std = 1.0 if name.endswith("embed_tokens.weight") else p[0].numel() ** -0.5
            if name.endswith(
                ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")
            ):
                std *= 0.3
            nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.endswith("class_embedding"):
            nn.init.normal_(p, std=0.5, generator=generator)


def plane_waves(patches: int, width: int) -> Tensor:
    """Positions to start from: sines and cosines along x and y, so that neighbours look alike from
    the first step. [P + 1, C], the class token's first."""
    side = math.isqrt(patches)
    waves = 0.7 * torch.logspace(0, -1, width // 4) * math.pi / 2  # [C/4] radians per patch
    angles = torch.arange(side)[:, None] * waves  # [side, C/4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, C/2]
    # [P, C]: row, column
    grid = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)
    return torch.cat([torch.zeros(1, width), 0.5 * grid])


# ------------------------------------------------------------------------------------------ stage 1

# What a patch names: its place (or the padding), and the shape (or none), colour and size of what
# is there.
NAMES = {
    "place": (*shapes.PLACES, "padding"),
    "shape": (*shapes.SHAPES, "none"),
    "colour": tuple(shapes.COLOURS),
    "size": tuple(shapes.SIZES),
}


class Namer(nn.Module):
    """The heads of stage 1, which map a patch's features to scores for every name. They are thrown
    away after it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(map(len, NAMES.values())))

    def forward(self, features: Tensor) -> list[Tensor]:
        """[B, P, C] -> per kind of name [B, P, names]"""
        return self.linear(self.norm(features)).split(
            [len(names) for names in NAMES.values()], dim=-1
        )


def patch_names(scene: shapes.Scene, grid: int) -> np.ndarray:
    """The true names of every patch of the picture padded to a square, [P, 4]; IGNORE_INDEX where
    there is none."""
    side = max(scene.width, scene.height)
    centres = (np.arange(grid) + 0.5) / grid * side
    column, row = (
        np.floor((centres - (side - length) / 2) / length * 3).astype(int)
        for length in (scene.width, scene.height)
    )
    outside = (column < 0) | (column > 2) | (row[:, None] < 0) | (row[:, None] > 2)  # [grid, grid]
    place = np.where(outside, len(shapes.PLACES), row[:, None] * 3 + column)
    table = np.full((len(NAMES["place"]), 4), IGNORE_INDEX)
    table[:, 0], table[:, 1] = np.arange(len(table)), NAMES["shape"].index("none")
    for thing in scene.things:
        table[thing.place, 1:] = [
            NAMES[kind].index(getattr(thing, kind)) for kind in ("shape", "colour", "size")
        ]
    return table[place.flatten()]


def seeing_batch(
    rng: random.Random, count: int, processor: ImageProcessor
) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, S, S] and names [B, P, 4] of crowded pictures. With up to nine things there is
    more to learn from each."""
    scenes = [
        shapes.sample_scene(rng, count=rng.randint(0, len(shapes.PLACES))) for _ in range(count)
    ]
    names = np.stack(
        [patch_names(scene, VISION.image_size // VISION.patch_size) for scene in scenes]
    )
    return picture_batch([shapes.draw(scene) for scene in scenes], processor), torch.from_numpy(
        names
    )


def picture_batch(pictures: Sequence[Image.Image], processor: ImageProcessor) -> Tensor:
    """The same numbers as `processor(pictures)` to float32 rounding, normalised for all of them at
    once."""
    # [B, height, width, 3]
    squares = np.stack([np.asarray(processor.square(picture)) for picture in pictures])
    x = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def naming_loss(scores: list[Tensor], names: Tensor) -> Tensor:
    """The cross-entropies of the four kinds of names, added."""
    return sum(
        F.cross_entropy(s.float().flatten(0, 1), names[..., i].flatten(), ignore_index=IGNORE_INDEX)
        for i, s in enumerate(scores)
    )


# ------------------------------------------------------------------------------------ stages 2 to 4


def encode_dialogue(tokenizer: Tokenizer, dialogue: shapes.Dialogue) -> tuple[list[int], list[int]]:
    """The ids that the model reads at inference, and as labels those of the answers."""
    turns = [(place_images(q, 1) if i == 0 else q, a) for i, (q, a) in enumerate(dialogue.turns)]
    return encode_answers(tokenizer, TEMPLATE, turns)


@dataclass
class Tails:
    """What follows the picture in conversations of about one length. rows: which picture each
    belongs to, [N]. ids, labels: [N, T], padded on the right, where nothing looks at it."""

    rows: Tensor
    ids: Tensor
    labels: Tensor


class SharedPrefix:
    """Takes the place of a KVCache, so that a picture is read once and answers several questions,
    none of which sees another: the keys and values of what all conversations begin with, and whose
    they are. Unlike a KVCache it lets gradients through."""

    def __init__(self):
        self.keys, self.values = [], []
        self.rows: Tensor | None = None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            self.keys.append(k)
            self.values.append(v)
            return k, v
        before = (
            self.keys[layer].index_select(0, self.rows),
            self.values[layer].index_select(0, self.rows),
        )
        return torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)


def split_dialogues(
    tokenizer: Tokenizer, dialogues: Sequence[Sequence[shapes.Dialogue]]
) -> tuple[list[int], list[Tails]]:
    """The ids before `<image>`, which all conversations share, and what comes after it, sorted by
    length."""
    tails = []
    for row, several in enumerate(dialogues):
        for dialogue in several:
            ids, labels = encode_dialogue(tokenizer, dialogue)
            at = ids.index(IMAGE_TOKEN_INDEX)
            head = ids[:at]
            tails.append((row, ids[at + 1 :], labels[at + 1 :]))
    tails.sort(key=lambda tail: len(tail[1]))
    size = math.ceil(len(tails) / BUCKETS)
    return head, [_pad_tails(tails[i : i + size]) for i in range(0, len(tails), size)]


def _pad_tails(tails: Sequence[tuple[int, list[int], list[int]]]) -> Tails:
    rows, ids, labels = zip(*tails, strict=True)
    longest = max(map(len, ids))
    return Tails(
        torch.tensor(rows), pad_rows(ids, longest, 0), pad_rows(labels, longest, IGNORE_INDEX)
    )


def pad_rows(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def answer_scores(
    model: Llava, prefix: Tensor, lengths: Tensor, tails: Sequence[Tails]
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of every answer token [n, V], the tokens themselves [n], and how many there are in
    the same conversation [n]. The scores are those that `model` computes for each conversation
    alone, which a test checks. prefix [B, S, C], of which `lengths` [B] are not padding."""
    language, shared = model.language_model, SharedPrefix()
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else prefix.dtype

    def run(x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        tables = rotary_tables(positions, language.config, dtype)
        context = Context(*tables, mask, False, language.attend, shared)
        for layer in language.layers:
            x, _ = layer(x, context)
        return language.norm(x)

    def triangle(length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril()

    before = torch.arange(prefix.shape[1])  # [S]
    run(prefix, before[None], triangle(len(before))[None, None])
    scores, true, counts = [], [], []
    for some in tails:
        shared.rows = some.rows
        count, length = some.ids.shape
        start = lengths[some.rows, None]  # [N, 1]
        seen = (before < start)[:, None].expand(-1, length, -1)  # [N, T, S]
        mask = torch.cat([seen, triangle(length).expand(count, -1, -1)], dim=2)  # [N, T, S + T]
        x = run(language.embed_tokens(some.ids), start + torch.arange(length), mask[:, None])
        chosen = some.labels[:, 1:] != IGNORE_INDEX  # position t predicts token t + 1
        scores.append(language.head(x[:, :-1][chosen]))
        true.append(some.labels[:, 1:][chosen])
        counts.append(chosen.sum(1, keepdim=True).expand_as(chosen)[chosen])
    return torch.cat(scores), torch.cat(true), torch.cat(counts)


def asking_batch(
    rng: random.Random, count: int
) -> tuple[list[shapes.Scene], list[list[shapes.Dialogue]]]:
    """Scenes and what is asked about them. The things of one scene in three are of three shapes and
    three colours, so that telling them apart takes both."""
    scenes = [
        shapes.sample_scene(
            rng, pairs=few_pairs(rng) if rng.random() < 1 / 3 else shapes.TRAINING_PAIRS
        )
        for _ in range(count)
    ]
    return scenes, [shapes.ask_any(scene, QUESTIONS, rng) for scene in scenes]


def few_pairs(rng: random.Random) -> list[tuple[str, str]]:
    some_shapes, some_colours = rng.sample(shapes.SHAPES, 3), rng.sample(tuple(shapes.COLOURS), 3)
    return [(s, c) for s, c in shapes.TRAINING_PAIRS if s in some_shapes and c in some_colours]


# ------------------------------------------------------------------------------------- the training


class Trainer:
    """The model, what stage 1 adds to it, and the losses of the four stages."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.config = model_config(tokenizer.vocab_size)
        self.model = Llava(self.config, eager)  # on a CPU `eager` trains faster than `fused`
        self.namer = Namer(VISION.hidden_size)
        for module in (self.model, self.namer):
            initialise(module, torch.Generator().manual_seed(seed))
        self.processor = ImageProcessor(VISION.image_size)
        # half the time where a CPU has instructions for it, ten times as long where it has none
        self.fast_bfloat16 = has_fast_bfloat16()
        self.parts = {
            "see": (self.model.vision_tower, self.namer),
            "read": (self.model.language_model,),
            "align": (self.model.projector,),
            "answer": (self.model.projector, self.model.language_model),
        }

    def loss(self, stage: str, rng: random.Random, count: int) -> tuple[Tensor, float]:
        """The loss on a fresh batch, and which fraction of the shapes (stage 1) or answer tokens
        was right."""
        if stage == "see":
            pixels, names = seeing_batch(rng, count, self.processor)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.fast_bfloat16):
                scores = self.namer(self.model.vision_tower(pixels))
            shape, true = scores[1].argmax(-1), names[..., 1]
            there = names[..., 2] != IGNORE_INDEX
            return naming_loss(scores, names), (shape == true)[there].float().mean().item()
        scenes, dialogues = asking_batch(rng, count)
        head, tails = split_dialogues(self.tokenizer, dialogues)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.fast_bfloat16):
            embed = self.model.language_model.embed_tokens
            if stage == "read":
                texts = [Prompt([Segment(shapes.describe(scene), "text")]) for scene in scenes]
                rows = [head + self.tokenizer.encode(text)[1:] for text in texts]
                lengths = torch.tensor([len(row) for row in rows])
                prefix = embed(pad_rows(rows, int(lengths.max()), 0))  # [B, S, C]
            else:
                pictures = [shapes.draw(scene, sharpness=rng.choice((1, 2))) for scene in scenes]
                # [B, P, C]
                patches = self.model.encode_images(picture_batch(pictures, self.processor))
                words = embed(torch.tensor([head] * count))
                prefix = torch.cat([words, patches.to(words.dtype)], dim=1)  # [B, S, C]
                lengths = torch.full((count,), prefix.shape[1])
            scores, true, counts = answer_scores(self.model, prefix, lengths, tails)
        # A plain mean over tokens would be mostly about descriptions, whose tokens are many and
        # easy.
        weights = counts**-0.5
        losses = F.cross_entropy(scores.float(), true, reduction="none")
        return (losses * weights).sum() / weights.sum(), (
            scores.argmax(-1) == true
        ).float().mean().item()

    def learning(self, stage: str) -> list[nn.Parameter]:
        """Lets the stage's parts learn and freezes the others; the parameters that learn."""
        for module in (self.model, self.namer):
            module.requires_grad_(False)
        for module in self.parts[stage]:
            module.requires_grad_(True)
        return [p for module in self.parts[stage] for p in module.parameters()]

    def make_optimisers(self, stage: str, rate: float) -> list[torch.optim.Optimizer]:
        """Muon (Jordan et al. 2024) for the matrices between hidden vectors: in a four-minute trial
        of stage 1 it told 65 % of the shapes apart, AdamW alone 47 %. AdamW gets the rest:
        embeddings, norms, biases, the patch convolution and the heads."""
        matrices, others = [], []
        for module in self.parts[stage]:
            for name, p in module.named_parameters():
                hidden = p.dim() == 2 and (".layers." in f".{name}" or "linear_" in name)
                (matrices if hidden else others).append(p)
        return [
            Muon(matrices, lr=rate),
            torch.optim.AdamW(others, lr=rate / 10, weight_decay=0.0, betas=(0.9, 0.98)),
        ]


class Muon(torch.optim.Optimizer):
    """Gradients averaged over steps, then turned into the nearest matrix that stretches no
    direction more than another (Jordan et al. 2024; their constants). torch.optim.Muon does the
    same in bfloat16 alone, which takes ten times as long on a CPU that has no instructions for
    it."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.01,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))
                rate = group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-rate)


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps, which bring all singular values to between about 0.7 and 1.2."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def rate_factor(step: int, steps: int, cooldown: float) -> float:
    """Up over WARMUP steps, level, and over the last part of the stage down to zero."""
    return min(1.0, (step + 1) / min(WARMUP, steps), (steps - step) / (cooldown * steps))


def average_gradients(parameters: Sequence[nn.Parameter], workers: int) -> None:
    """Every worker gets the mean of all workers' gradients, in one message."""
    if workers == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= workers
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(mean.view_as(p))


def train(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """All stages, by one of the workers; the first one (rank 0) reports and saves."""
    # what a worker gets when the first process is killed
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # two processes of one thread each beat one process of two threads
    if options.workers > 1:
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=options.workers
        )
    trainer = Trainer(Tokenizer(options.out / "tokenizer.model"), options.seed)
    path = options.out / CHECKPOINT
    saved = torch.load(path, weights_only=True) if path.exists() else None
    first, start = 0, 0
    if saved is not None:
        trainer.model.load_state_dict(saved["model"])
        trainer.namer.load_state_dict(saved["namer"])
        first, start = saved["stage"], saved["step"]
        if rank == 0:
            print(
                f"resumed {path} at stage {first + 1} ({STAGES[first].name}), step {start}",
                file=sys.stderr,
            )
    for number, stage in enumerate(STAGES[first:], start=first):
        run_stage(rank, options, trainer, number, stage, start, saved and saved["optimisers"])
        start, saved = 0, None
    if rank == 0:
        export(trainer, options.out)
        path.unlink(missing_ok=True)
    if options.workers > 1:
        dist.destroy_process_group()


def run_stage(
    rank: int,
    options: argparse.Namespace,
    trainer: Trainer,
    number: int,
    stage: Stage,
    start: int,
    saved: list[dict] | None,
) -> None:
    """The steps of one stage, from `start`; saved: the states of its optimisers at that point."""
    steps = max(2, round(stage.steps * options.scale))
    share = (options.pictures or stage.pictures) // options.workers
    parameters = trainer.learning(stage.name)
    optimisers = trainer.make_optimisers(stage.name, stage.rate)
    for optimiser, state in zip(optimisers, saved or (), strict=bool(saved)):
        optimiser.load_state_dict(state)
    rates = [stage.rate, stage.rate / 10]
    title = f"{number + 1}/{len(STAGES)} {stage.name}"
    with tqdm(
        total=steps, initial=start, desc=title, unit="step", mininterval=1, disable=rank > 0
    ) as bar:
        shown = None
        for step in range(start, steps):
            rng = random.Random(f"{options.seed}/{stage.name}/{step}/{rank}")
            loss, right = trainer.loss(stage.name, rng, share)
            loss.backward()
            average_gradients(parameters, options.workers)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimiser, rate in zip(optimisers, rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate * rate_factor(step, steps, stage.cooldown)
                optimiser.step()
                optimiser.zero_grad()
            now = torch.tensor([loss.item(), right])
            shown = now if shown is None else 0.95 * shown + 0.05 * now
            bar.set_postfix_str(f"loss {shown[0]:.3f}, right {shown[1]:.1%}", refresh=False)
            bar.update()
            if rank == 0 and ((step + 1) % options.save_every == 0 or step + 1 == steps):
                save_checkpoint(options.out / CHECKPOINT, trainer, number, step + 1, optimisers)


def save_checkpoint(path: Path, trainer: Trainer, stage: int, step: int, optimisers: list) -> None:
    content = {
        "stage": stage,
        "step": step,
        "model": trainer.model.state_dict(),
        "namer": trainer.namer.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # a kill in between leaves the old one whole


# --------------------------------------------------------------------------------------- the folder


def export(trainer: Trainer, out: Path) -> None:
    """The folder as transformers would have written it for the hub (llava-hf), in float16, and the
    example pictures."""
    config, model = trainer.config, trainer.model
    tensors = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        prefix = {
            "vision_tower": "vision_tower.vision_model.",
            "projector": "multi_modal_projector.",
        }.get(part)
        if prefix is None:
            prefix = "language_model." if rest.startswith("lm_head.") else "language_model.model."
        tensors[prefix + rest] = tensor.to(torch.float16).contiguous()
    tensors |= unused_tensors(model)
    half, files, size = sum(t.nbytes for t in tensors.values()) / 2, [{}, {}], 0
    for name in sorted(tensors):
        files[size >= half][name] = tensors[name]
        size += tensors[name].nbytes
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for name, shard in zip(names, files, strict=True):
        save_file(shard, out / name, metadata={"format": "pt"})
    placed = {tensor: name for name, shard in zip(names, files, strict=True) for tensor in shard}
    write_json(
        {"metadata": {"total_size": size}, "weight_map": placed},
        out / "model.safetensors.index.json",
    )
    text, vision = asdict(config.text), asdict(config.vision)
    for computed in ("rope_factor", "tie_word_embeddings"):
        del text[computed]
    content = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": IGNORE_INDEX,
        "image_seq_length": config.tokens_per_image,
        "image_token_index": config.image_token_id,
        "model_type": "llava",
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "float16",
            **text,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": vision["hidden_size"],
            **vision,
        },
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default",
        "vocab_size": config.text.vocab_size,
    }
    write_json(content, out / "config.json")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": config.pad_token_id}
    write_json({"_from_model_config": True, **ids}, out / "generation_config.json")
    side = config.vision.image_size
    write_json({**PREPROCESSOR, "crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}},
               out / "preprocessor_config.json")  # fmt: skip
    for i, scene in enumerate(shapes.EXAMPLES, start=1):
        shapes.draw(scene, sharpness=4).save(out / f"example-{i}.png", optimize=True)


def unused_tensors(model: Llava) -> dict[str, Tensor]:
    """What the hub's layout has beyond layer -2, which nobody reads: a last block that passes its
    input on (its two output matrices are zero) and the final norm."""
    depth = len(model.vision_tower.encoder.layers)
    block = {
        name: torch.zeros_like(t)
        for name, t in model.vision_tower.encoder.layers[0].state_dict().items()
    }
    tensors = {f"encoder.layers.{depth}.{name}": t for name, t in block.items()}
    tensors |= {
        f"post_layernorm.{name}": torch.zeros(VISION.hidden_size) for name in ("weight", "bias")
    }
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
    return {f"vision_tower.vision_model.{name}": t.to(torch.float16) for name, t in tensors.items()}


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "model_max_length": TEXT.max_position_embeddings,
    "pad_token": "<pad>",
    "padding_side": "left",
    "processor_class": "LlavaProcessor",
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
PREPROCESSOR = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the folder to make; holds the checkpoint until then",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each (default 2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="times the steps of every stage, to try things out"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        help="per step, over all workers, instead of each stage's own number",
    )
    parser.add_argument(
        "--save-every", type=int, default=SAVE_EVERY, help=f"steps (default {SAVE_EVERY})"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, and replace what --out holds"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an error happened")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.restart:
        for name in (CHECKPOINT, FINISHED):
            (options.out / name).unlink(missing_ok=True)
    if not (options.out / CHECKPOINT).exists():
        if (options.out / FINISHED).exists():
            print(
                f"{options.out} holds a finished model; --restart trains it anew. "
                f"{how_to_ask(options.out)}"
            )
            return 0
        train_tokenizer(
            options.out / "tokenizer.model",
            options.seed,
            max(100, round(4000 * min(1, options.scale))),
        )
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        if options.workers == 1:
            train(0, options, rendezvous)
        else:
            torch.multiprocessing.spawn(train, (options, rendezvous), nprocs=options.workers)
    print(f"{options.out} holds the model. {how_to_ask(options.out)}")
    return 0


def how_to_ask(out: Path) -> str:
    weights, picture = (shlex.quote(str(path)) for path in (out, out / "example-1.png"))
    return f"Ask it with: python -m minillava.generate -m {weights} -i {picture}"


if __name__ == "__main__":
    interrupts.end(
        lambda: run(main, verbose=not {"-v", "--verbose"}.isdisjoint(sys.argv), prints=True)
    )
