#!/usr/bin/env python3
"""Make what the parity tests compare with, by running Hugging Face transformers. Nothing else
outside the tests imports it.

Without --checkpoint it rewrites tests/reference/: a toy tokenizer, three toy checkpoints, what
transformers computes with them, pictures with their pixels, and how every kind of checkpoint names
its tensors. The tests then need neither transformers nor a download. What is stored is the result
of the same network in float64, which counts as the exact answer, and how far transformers in
float32, bfloat16 and float16 is from it: the tests allow minillava twice that. As
every processor rounds in its own way, that distance is taken with each of several instruction sets,
and the largest is stored. Running it twice writes the same files.

With --checkpoint it writes one checkpoint with random weights, of a chosen size, in a chosen
dialect, anywhere.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"
sys.path.insert(0, str(ROOT))  # run from a checkout, installed or not
# the tests and this tool drive transformers through the same lines
sys.path.insert(0, str(ROOT / "tests" / "support"))

import hf  # noqa: E402

from minillava.cli.arguments import Parser  # noqa: E402
from minillava.cli.messages import run  # noqa: E402
from minillava.options import dtype_name  # noqa: E402

PIECES = 440
NEW_TOKENS = 16
PROCESSOR_STD, PROCESSOR_MEAN = (
    (0.26862954, 0.26130258, 0.27577711),
    (0.48145466, 0.4578275, 0.40821073),
)

TEXT = """
A chat between a curious human and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the human's questions.
A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions.
USER: Please describe this image in detail. ASSISTANT: The picture shows a red circle on a blue ground.
USER: What is in this image? ASSISTANT: There is a small yellow square in the upper left corner.
USER: Which shape is larger, the circle or the triangle? ASSISTANT: The triangle is larger than the circle.
USER: How many shapes are there? ASSISTANT: There are 3 shapes: two circles and one square.
USER: What colour is the sky above the houses? ASSISTANT: The sky is grey, with a little orange near the ground.
The image shows a street with a row of white houses, a bicycle against the wall and a cat asleep on the step.
In the foreground a man stands on a wooden bridge and looks down into the water.
Behind him the lake is quiet, and the hills on the far side are green and brown.
The light comes from the right, so that the shadows of the trees fall across the path.
On the left of the picture there is a table with a cup, a plate and an open book.
A woman in a black coat holds an umbrella; the rain has made the pavement shine.
The sign above the door says "OPEN 7-22", and below it somebody has drawn a smiling face.
At the top of the image, between the clouds, a bird flies from left to right.
It is probably early in the morning: the street is empty, and only one window is lit.
The child in the middle throws a ball to the dog, which is about to jump.
Overall, the scene gives a calm and friendly impression.
""".strip()

PROMPTS = {
    "one": "USER: <image>\nWhat is in this picture? ASSISTANT:",
    "none": "USER: How many circles are there? ASSISTANT:",
    "two": "USER: <image>\n<image>\nWhich is larger? ASSISTANT:",
}
ANSWERS = {"none": " There are 2 circles.", "one": " A red circle.", "two": " The first."}

SAMPLED = [
    {"seed": 1, "temperature": 1.0},
    {"seed": 2, "temperature": 0.7, "top_k": 5},
    {"seed": 3, "temperature": 1.3, "top_p": 0.8},
    {"seed": 4, "temperature": 1.0, "min_p": 0.1},
    {
        "seed": 5,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    },
    {"seed": 6, "repetition_penalty": 1.5},
]

# Environments in which torch's libraries use other kernels than this processor's best.
KERNELS = [
    {},
    {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    {"MKL_CBWR": "COMPATIBLE"},
]

TOYS = {
    "plain": hf.SIZES["toy"],
    "grouped": {
        "text": {
            **hf.SIZES["toy"]["text"],
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        "vision": hf.SIZES["toy"]["vision"],
    },
    "tied": {
        "text": hf.SIZES["toy"]["text"],
        "vision": {**hf.SIZES["toy"]["vision"], "num_attention_heads": 2},
        "tie_word_embeddings": True,
    },
}
IMAGE_SIZE = hf.SIZES["toy"]["vision"]["image_size"]


def main() -> int:
    options = parse_options()
    # the order of a sum, and so its last bit, can depend on the number of threads
    torch.set_num_threads(1)
    if options.errors_of is not None:
        print(json.dumps({name: measure_errors(options.errors_of, name) for name in TOYS}))
    elif options.checkpoint is not None:
        make_checkpoint(options)
    else:
        make_reference()
    return 0


def parse_options() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="write one random checkpoint here instead"
    )
    # how it calls itself, see KERNELS
    parser.add_argument("--errors-of", type=Path, help=argparse.SUPPRESS)
    chosen = parser.add_argument_group("with --checkpoint")
    chosen.add_argument("--size", choices=hf.SIZES, default="toy", help="default: %(default)s")
    described = "; ".join(f"{name}: {what}" for name, what in hf.DIALECTS.items())
    chosen.add_argument(
        "--dialect", choices=hf.DIALECTS, default="hub", help=f"{described}. default: %(default)s"
    )
    chosen.add_argument(
        "--dtype", choices=list(hf.DTYPES)[:3], default="float32", help="default: %(default)s"
    )
    chosen.add_argument(
        "--tokenizer", type=Path, help="a SentencePiece tokenizer.model; default: the toy one"
    )
    chosen.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the pictures; default: the size's own",
    )
    chosen.add_argument(
        "--shards", type=int, default=1, help="number of weight files; default: %(default)s"
    )
    chosen.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


def make_checkpoint(options: argparse.Namespace) -> None:
    tokenizer = options.tokenizer or REFERENCE / "plain" / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    sizes = hf.SIZES[options.size]
    vision = sizes["vision"] | ({"image_size": options.image_size} if options.image_size else {})
    config = hf.hub_config(sizes["text"], vision, pieces=pieces)
    state = hf.random_state(config, options.seed)
    hf.write_checkpoint(
        options.checkpoint,
        config,
        state,
        dialect=options.dialect,
        dtype=options.dtype,
        tokenizer=tokenizer,
        shards=options.shards,
    )
    print(
        f"wrote {options.checkpoint}: {sum(w.numel() for w in state.values()):,} weights, "
        f"{options.dialect}"
    )


def make_reference() -> None:
    """Make everything in a folder beside tests/reference/, which then takes its place."""
    partial = REFERENCE.with_name("reference.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)
    tokenizer = partial / "tokenizer.model"
    hf.write_bytes(train_tokenizer(), tokenizer)
    pixels = make_pictures(partial)
    for name in TOYS:
        print(f"{name}: ", end="", flush=True)
        config, state = find_weights(name, tokenizer, pixels)
        folder = hf.write_checkpoint(partial / name, config, state, tokenizer=tokenizer)
        check_that_transformers_agrees(folder)
        facts = describe(folder, pixels, Tokenizer(tokenizer))
        with hf.float64():
            exact = compute(folder, facts, "float64", "eager")
        hf.write_tensors(exact, partial / f"{name}.safetensors")
        hf.write_json(facts, partial / f"{name}.json")
        print(f"greedy {facts['greedy']}")
        if name == "plain":
            hf.write_json(
                describe_dialects(folder, config, state, pixels), partial / "dialects.json"
            )
    tokenizer.unlink()
    for name, errors in largest_errors(partial).items():
        path = partial / f"{name}.json"
        hf.write_json({**hf.read_json(path), "errors": errors}, path)
    hf.write_json(conditions(), partial / "made-with.json")
    for path in REFERENCE.glob("relatives.*"):  # tools/relatives_reference.py makes them
        shutil.copy(path, partial)
    shutil.rmtree(REFERENCE, ignore_errors=True)
    partial.rename(REFERENCE)
    print(
        f"wrote {REFERENCE}: "
        f"{sum(f.stat().st_size for f in REFERENCE.rglob('*') if f.is_file()):,} bytes"
    )


def conditions() -> dict:
    """What made the reference. `exponentials` are the random numbers that sampling is built on:
    where torch draws others from the same seed, stored samples cannot be compared."""
    torch.manual_seed(0)
    packages = ("torch", "transformers", "sentencepiece", "pillow", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "exponentials": torch.empty(8).exponential_().tolist(),
    }


# --- tokenizer ------------------------------------------------------------------------------------


def train_tokenizer() -> bytes:
    """A SentencePiece model with Llama's conventions, small enough to store."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Tokenizer:
    """The ids of prompts as the original LLaVA makes them: each chunk between pictures is tokenized
    by itself."""

    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(self, prompt: str) -> list[int]:
        first, *others = [self.model.encode(chunk) for chunk in prompt.split("<image>")]
        return [self.model.bos_id(), *first, *(i for chunk in others for i in [hf.IMAGE, *chunk])]


# --- pictures -------------------------------------------------------------------------------------


def draw(width: int, height: int, seed: int) -> Image.Image:
    """A gradient with a few shapes on it: smooth parts, hard edges and thin lines for the resizing
    to work on."""
    choose = random.Random(seed)
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], axis=-1).astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    for shape in (canvas.ellipse, canvas.rectangle, canvas.ellipse, canvas.line):
        left, top = choose.randrange(width // 2), choose.randrange(height // 2)
        right, bottom = choose.randrange(left + 2, width), choose.randrange(top + 2, height)
        shape((left, top, right, bottom), fill=tuple(choose.randrange(256) for _ in "rgb"))
    return picture


def make_pictures(folder: Path) -> dict[str, torch.Tensor]:
    """Writes pictures/, and the pixels transformers makes of them; returns the padded ones, which
    the models look at.

    For each picture: the SHA-256 of the float32 pixels, and, to see what is wrong when that
    differs, the grey levels they came from.
    """
    alpha = Image.linear_gradient("L")
    pictures = {
        "landscape": draw(90, 60, 1),
        "portrait": draw(40, 70, 2),
        "square": draw(64, 64, 3),
        "exact": draw(56, 56, 4),
        "tiny": draw(20, 15, 5),
        "strip": draw(200, 30, 6),
        "alpha": draw(70, 50, 7),
        "grey": draw(61, 47, 8).convert("L"),
        "grey-alpha": draw(48, 66, 9).convert("LA"),
        "palette": draw(50, 80, 10).quantize(16),
        "palette-transparent": draw(80, 50, 11).quantize(16),
        "black-and-white": draw(57, 59, 12).convert("1"),
    }
    for name in ("alpha", "grey-alpha"):
        pictures[name].putalpha(alpha.resize(pictures[name].size))
    levels, facts, seen = {}, {}, {}
    for name, picture in pictures.items():
        file = folder / "pictures" / f"{name}.png"
        picture.save(file, **({"transparency": 3} if name == "palette-transparent" else {}))
        for aspect in ("crop", "pad"):
            with Image.open(file) as opened:
                opened.load()
                pixels = hf.pixel_values([opened], IMAGE_SIZE, pad=aspect == "pad")
            back = (pixels[0].double() * column(PROCESSOR_STD) + column(PROCESSOR_MEAN)) * 255
            levels[f"{name}.{aspect}"] = back.round().to(torch.uint8)
            facts[f"{name}.{aspect}"] = hashlib.sha256(pixels[0].numpy().tobytes()).hexdigest()
            if aspect == "pad":
                seen[name] = pixels[0]
    hf.write_tensors(levels, folder / "pictures.safetensors")
    hf.write_json(facts, folder / "pictures.json")
    return seen


def column(three: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(three, dtype=torch.float64)[:, None, None]


# --- models ---------------------------------------------------------------------------------------


def cases(
    tokenizer: Tokenizer, pixels: dict[str, torch.Tensor]
) -> tuple[list, torch.Tensor, list, torch.Tensor]:
    """One prompt with its picture, and a batch of prompts with no, one and two pictures with
    theirs."""
    one, (a, b) = tokenizer.encode(PROMPTS["one"]), (pixels["landscape"], pixels["portrait"])
    batch = [tokenizer.encode(PROMPTS[name]) for name in ("none", "one", "two")]
    return [one], a[None], batch, torch.stack([a, b, a])


def find_weights(name: str, tokenizer: Path, pixels: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """The first seed whose answers make a good test: no step nearly a tie (another processor's
    rounding would decide it), no answer that goes in circles, another answer for another picture,
    one row that ends before the others."""
    config = hf.hub_config(**TOYS[name], pieces=PIECES)
    one, image, batch, images = cases(Tokenizer(tokenizer), pixels)
    for seed in range(1000):
        state = hf.random_state(config, seed)
        with tempfile.TemporaryDirectory() as folder:
            model = hf.load(hf.write_checkpoint(Path(folder), config, state))
        answer = hf.generate(model, batch, images, max_new_tokens=NEW_TOKENS)
        ends = [2 in row for row in answer.new.tolist()]
        if sum(ends) != 1 or closest(answer) < 1e-3 or 2 in answer.new[:, :4]:
            continue
        answer, other = (
            hf.generate(model, one, x, max_new_tokens=NEW_TOKENS) for x in (image, images[1:2])
        )
        lively = answer.new.unique().numel() > NEW_TOKENS / 2 and not torch.equal(
            answer.new, other.new
        )
        if closest(answer) > 1e-3 and lively:
            print(f"seed {seed}, ", end="")
            return config, state
    raise RuntimeError(f"{name}: no seed gives answers that make a good test")


def closest(answer) -> float:
    """The smallest lead of the best token over the second best, over all steps of rows that have
    not ended."""
    ended = (answer.new == 2).cumsum(1) - (answer.new == 2).long() > 0
    best = torch.stack(answer.logits, dim=1).topk(2).values  # [B, n, 2]
    return (best[..., 0] - best[..., 1])[~ended].min().item()


def check_that_transformers_agrees(folder: Path) -> None:
    """Load the folder, save it again: transformers must write the same tensors under the same
    names."""
    with tempfile.TemporaryDirectory() as again:
        hf.load(folder).save_pretrained(again)
        ours, theirs = (
            load_file(folder / "model.safetensors"),
            load_file(Path(again) / "model.safetensors"),
        )
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
        raise RuntimeError(
            f"{folder.name}: transformers writes other names: {sorted(ours.keys() ^ theirs.keys())}"
        )


def describe(folder: Path, pixels: dict[str, torch.Tensor], tokenizer: Tokenizer) -> dict:
    """Everything that is told in ids: prompts, labels and transformers' answers in float32."""
    one, image, batch, images = cases(tokenizer, pixels)
    endings = [tokenizer.model.encode(ANSWERS[name]) for name in ("none", "one", "two")]
    model = hf.load(folder)

    def answer(rows: list[list[int]], pictures: torch.Tensor, settings: dict) -> list[list[int]]:
        return hf.generate(
            model, rows, pictures, max_new_tokens=NEW_TOKENS, record=False, **settings
        ).new.tolist()

    return {
        "prompt": PROMPTS["one"],
        "input_ids": one,
        "pictures": ["landscape"],
        "batch_input_ids": batch,
        "batch_pictures": ["landscape", "portrait", "landscape"],
        "labelled_input_ids": [
            prompt + ending for prompt, ending in zip(batch, endings, strict=True)
        ],
        # A label on a picture, as 5 is here, has to be ignored as well.
        "labels": [
            [5 if i == hf.IMAGE else hf.IGNORED for i in prompt] + ending
            for prompt, ending in zip(batch, endings, strict=True)
        ],
        "greedy": answer(one, image, {})[0],
        "batch_greedy": answer(batch, images, {}),
        "sampled": [{"settings": s, "ids": answer(one, image, s)[0]} for s in SAMPLED],
        "batch_sampled": {"settings": SAMPLED[0], "ids": answer(batch, images, SAMPLED[0])},
    }


def compute(folder: Path, facts: dict, dtype: str, attention: str) -> dict[str, torch.Tensor]:
    """Every tensor that is stored or measured, from transformers."""
    files = [folder.parent / "pictures" / f"{name}.png" for name in facts["batch_pictures"]]
    images = hf.pixel_values([Image.open(file) for file in files], IMAGE_SIZE, pad=True)
    model = hf.load(folder, dtype, attention)
    tensors = hf.forward(model, facts["input_ids"], images[:1])
    batch = hf.forward(model, facts["labelled_input_ids"], images, facts["labels"])
    del tensors["mask"]
    # The last positions of each row are real, whatever its padding; all of them would be a lot of
    # numbers.
    return {name: x.contiguous() for name, x in tensors.items()} | {
        "batch_logits": batch["logits"][:, -4:].contiguous(),
        "loss": batch["loss"],
    }


def measure_errors(partial: Path, name: str) -> dict:
    """dtype -> attention function -> tensor -> how far transformers' is from the float64 one."""
    exact, facts = (
        load_file(partial / f"{name}.safetensors"),
        hf.read_json(partial / f"{name}.json"),
    )
    return {
        dtype: {
            attention: {
                key: hf.error(tensor, exact[key])
                for key, tensor in compute(partial / name, facts, dtype, attention).items()
            }
            for attention in ("eager", "sdpa")
        }
        for dtype in ("float32", "bfloat16", "float16")
    }


def largest_errors(partial: Path) -> dict:
    """For each toy, the errors of the worst of KERNELS."""
    return worst([__file__, "--errors-of", str(partial)])


def worst(command: list[str]) -> dict:
    """Run a Python script that prints JSON with each of KERNELS, since which kernels run is decided
    when a process starts; returns the largest of each number."""
    measured = [
        json.loads(
            subprocess.run(
                [sys.executable, *command],
                env={**os.environ, **kernel},
                check=True,
                stdout=subprocess.PIPE,
            ).stdout
        )
        for kernel in KERNELS
    ]

    def largest(several: list):
        if isinstance(several[0], dict):
            return {key: largest([one[key] for one in several]) for key in several[0]}
        return max(several)

    return largest(measured)


# --- dialects -------------------------------------------------------------------------------------


def describe_dialects(
    plain: Path, config: dict, state: dict, pixels: dict[str, torch.Tensor]
) -> dict:
    """For every dialect, the JSON files of its folders and where each of its tensors comes from, so
    that the tests can write it from the stored `plain` checkpoint. Which tensor is which is told by
    its bytes, not by its name."""
    stored = load_file(plain / "model.safetensors")
    model = hf.load(plain)
    row, picture = [[1, hf.IMAGE, 5, 6, 7]], pixels["landscape"][None]
    expected = hf.forward(model, row, picture)["logits"]
    dialects = {}
    for dialect in hf.DIALECTS:
        with tempfile.TemporaryDirectory() as folder:
            folder = hf.write_checkpoint(Path(folder), config, state, dialect=dialect)
            if not dialect.startswith("original"):  # transformers cannot read those
                logits = hf.forward(hf.load(folder), row, picture)["logits"]
                if not torch.equal(logits, expected):
                    raise RuntimeError(
                        f"{dialect}: transformers gives other logits than with {plain.name}"
                    )
            folders = [folder, *(f for f in sorted(folder.iterdir()) if f.is_dir())]
            dialects[dialect] = {
                str(f.relative_to(folder)): describe_folder(f, stored) for f in folders
            }
    return dialects


def describe_folder(folder: Path, stored: dict[str, torch.Tensor]) -> dict:
    """`keys`: stored name -> its name in the hub dialect; `rows`: how many of its first rows, where
    not all; `values`: tensors written out (old buffers); `shapes`: tensors whose values do not
    matter (CLIP's other half)."""
    described = {"files": {}, "keys": {}, "rows": {}, "values": {}, "shapes": {}}
    for file in sorted(folder.glob("*.json")):
        described["files"][file.name] = hf.read_json(file)
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        same = (
            [k for k, w in stored.items() if w[: len(tensor)].equal(tensor)] if tensor.dim() else []
        )
        if len(same) == 1:
            described["keys"][name] = same[0]
            if len(stored[same[0]]) > len(tensor):
                described["rows"][name] = len(tensor)
        elif name.endswith(("position_ids", "inv_freq")):
            described["values"][name] = {
                "dtype": dtype_name(tensor.dtype),
                "values": tensor.tolist(),
            }
        elif name.startswith(
            ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
        ):
            described["shapes"][name] = list(tensor.shape)
        else:
            raise RuntimeError(f"{name} is none of the stored tensors, or several: {same}")
    return described


if __name__ == "__main__":
    sys.exit(run(main, verbose=True, prints=True))
