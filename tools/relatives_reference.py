#!/usr/bin/env python3
"""Rewrite tests/reference/relatives.*: what transformers computes with small relatives of
LLaVA-1.5, the kinds of tests/support/relatives.py.

Of each kind: the prompts, ids and pixels of two questions, and their projected features, last
hidden states, last logits and answers. As tools/make_reference.py does for LLaVA-1.5, it stores the
network in float64 and how far transformers is from it, by the worst of several instruction sets.
The weights are not stored, but drawn from a seed. Running it twice writes the same files.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import make_reference  # finds tests/support/
import torch
from safetensors.torch import load_file

import hf  # isort: skip
import relatives  # isort: skip

from minillava.cli.arguments import Parser
from minillava.cli.messages import run

TENSORS = make_reference.REFERENCE / "relatives.safetensors"
PICTURES = make_reference.REFERENCE / "pictures"
QUESTIONS = [
    (["landscape"], "What is in the image?"),
    (["strip", "portrait"], "Compare the 1234 images.\n\n ä星"),
]
LAST = 4  # positions whose logits are stored
NEW_TOKENS = 8

CHATML = "<|im_start|>user\n{images}\n{text}<|im_end|>\n<|im_start|>assistant\n", ""
PROMPTS = {  # and what stands between two pictures
    "interleave": CHATML,
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{images}\n{text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "\n",
    ),
    "onevision": (CHATML[0], "\n"),
    "mistral-tiles": ("[INST] {images}\n{text} [/INST]", "\n"),
}
OTHERS = ("USER: {images}\n{text} ASSISTANT:", "\n")


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--errors", metavar="FOLDER", help="how it calls itself")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of a sum can depend on the number of threads
    if options.errors:
        print(json.dumps({kind: errors_of(Path(options.errors), kind) for kind in relatives.KINDS}))
        return 0
    facts, exact = {}, {}
    with tempfile.TemporaryDirectory() as home:
        for kind in relatives.KINDS:
            facts[kind] = find(kind, Path(home) / kind)
            with hf.float64():
                exact |= named(
                    kind, compute(Path(home) / kind, kind, facts[kind], "float64", "eager")
                )
        hf.write_json(facts, Path(home) / relatives.FACTS.name)
        hf.write_tensors(exact, Path(home) / TENSORS.name)
        for kind, errors in make_reference.worst([__file__, "--errors", home]).items():
            facts[kind]["errors"] = errors
    hf.write_json(facts, relatives.FACTS)
    hf.write_tensors(exact, TENSORS)
    sizes = [path.stat().st_size for path in (relatives.FACTS, TENSORS)]
    print(f"wrote {relatives.FACTS.parent}/relatives.*: {sum(sizes):,} bytes")
    return 0


def named(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


def find(kind: str, folder: Path) -> dict:
    """What is stored of a kind in JSON, but for the errors, of the first seed whose answers make a
    good test; `folder` then holds its network."""
    config = relatives.config_of(kind)
    shapes = {name: list(shape) for name, shape in hf.shapes_of(config).items()}
    for seed in range(200):
        relatives.write(folder, kind, seed, shapes)
        model = hf.load(folder)
        asked = [question(folder, kind, *each) for each in QUESTIONS]
        answers = [answer(model, given(kind, model, each)) for each in asked]
        for each, (ids, _) in zip(asked, answers, strict=True):
            each["greedy"] = ids
        if good(answers, config.get("eos_token_id", 2)):
            print(f"{kind}: seed {seed}, greedy {[ids for ids, _ in answers]}")
            return {"seed": seed, "shapes": shapes, "questions": asked}
    raise RuntimeError(f"{kind}: no seed gives answers that make a good test")


def good(answers: list[tuple[list[int], float]], end: int) -> bool:
    """Whether no step is nearly a tie, which another processor's rounding would decide, no answer
    ends early or goes in circles, and the two differ."""
    rows = [ids for ids, _ in answers]
    varied = all(len(set(ids)) > NEW_TOKENS / 2 and end not in ids for ids in rows)
    return varied and min(lead for _, lead in answers) > 1e-3 and rows[0] != rows[1]


def question(folder: Path, kind: str, names: list[str], text: str) -> dict:
    """A question in LLaVA's ids, where -200 is a picture, and the SHA-256 of its pixels."""
    form, between = PROMPTS.get(kind, OTHERS)
    prompt = form.format(images=between.join(["<image>"] * len(names)), text=text)
    shown = pixels_of(kind, names)["pixel_values"]
    digests = [hashlib.sha256(each.contiguous().numpy().tobytes()).hexdigest() for each in shown]
    ids = tokenize(folder, kind)(prompt)
    return {"pictures": names, "prompt": prompt, "input_ids": ids, "pixels": digests}


def tokenize(folder: Path, kind: str) -> Callable[[str], list[int]]:
    """By transformers' tokenizer where it is a byte-level one, which finds <image> itself."""
    if relatives.KINDS[kind]["special"] is None:
        return make_reference.Tokenizer(relatives.TOKENIZER).encode
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    image = tokenizer.convert_tokens_to_ids("<image>")
    return lambda prompt: [hf.IMAGE if i == image else i for i in tokenizer(prompt).input_ids]


def pixels_of(kind: str, names: list[str]) -> dict[str, torch.Tensor]:
    """What transformers' Pillow-based processors make of pictures, padded to a square where LLaVA
    does that."""
    from PIL import Image

    pictures = [Image.open(PICTURES / f"{name}.png").convert("RGB") for name in names]
    config = relatives.config_of(kind)
    size = config["vision_config"]["image_size"]
    square = {"height": size, "width": size}
    if kind == "onevision":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        processor = LlavaOnevisionImageProcessorPil(
            size=square,
            image_grid_pinpoints=config["image_grid_pinpoints"],
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        return dict(processor([pictures], return_tensors="pt"))  # of one prompt
    if "siglip" in relatives.config_of(kind)["vision_config"]["model_type"]:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        return dict(SiglipImageProcessorPil(size=square)(pictures, return_tensors="pt"))
    if "image_grid_pinpoints" in relatives.config_of(kind):
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil,
        )

        processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": size}, crop_size=square, image_grid_pinpoints=relatives.GRID
        )
        return dict(processor(pictures, return_tensors="pt"))
    return {"pixel_values": hf.pixel_values(pictures, size, pad=True)}


@torch.no_grad()
def features(model, pixels: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A picture's vectors as they stand in the prompt."""
    pixels = pixels | {"pixel_values": pixels["pixel_values"].to(model.dtype)}
    return list(model.model.get_image_features(**pixels).pooler_output)


def given(kind: str, model, asked: dict) -> dict[str, torch.Tensor]:
    """transformers' inputs: the image id once for each of a picture's positions."""
    pixels = pixels_of(kind, asked["pictures"])
    counts, image = iter(map(len, features(model, pixels))), model.config.image_token_index
    wide = [
        i for t in asked["input_ids"] for i in ([image] * next(counts) if t == hf.IMAGE else [t])
    ]
    ids = torch.tensor([wide])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels


@torch.no_grad()
def answer(model, inputs: dict[str, torch.Tensor]) -> tuple[list[int], float]:
    """A greedy answer, and the smallest lead of its best token over the second best."""
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True,
        repetition_penalty=1.0, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2).values
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), (
        best[..., 0] - best[..., 1]
    ).min().item()


@torch.no_grad()
def compute(
    folder: Path, kind: str, facts: dict, dtype: str, attention: str
) -> dict[str, torch.Tensor]:
    """Every tensor that is stored or measured, from transformers."""
    model, tensors = hf.load(folder, dtype, attention), {}
    for number, asked in enumerate(facts["questions"]):
        inputs = given(kind, model, asked)
        out = model(**inputs, use_cache=False, output_hidden_states=True)
        tensors[f"{number}.projected"] = torch.cat(
            features(model, pixels_of(kind, asked["pictures"]))
        )
        tensors[f"{number}.hidden"] = out.hidden_states[-1][0].contiguous()
        tensors[f"{number}.logits"] = out.logits[0, -LAST:].contiguous()
    return tensors


def errors_of(home: Path, kind: str) -> dict:
    """dtype -> attention function -> tensor -> how far transformers' is from the float64 one."""
    facts = hf.read_json(home / relatives.FACTS.name)[kind]
    exact = load_file(home / TENSORS.name)
    return {
        dtype: {
            attention: {
                name: hf.error(tensor, exact[f"{kind}.{name}"])
                for name, tensor in compute(home / kind, kind, facts, dtype, attention).items()
            }
            for attention in ("eager", "sdpa")
        }
        for dtype in ("float32", "bfloat16", "float16")
    }


if __name__ == "__main__":
    sys.exit(run(main, verbose=True, prints=True))
