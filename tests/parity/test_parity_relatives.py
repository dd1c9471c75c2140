"""The relatives of LLaVA-1.5 against stored numbers of Hugging Face transformers
(tools/relatives_reference.py); runs without transformers.

As in test_parity_stored.py the measure is the same network in float64: for every tensor, dtype and
attention function max |ours - float64| is at most twice that of transformers. Ids and pixels are
equal. test_parity_live.py and test_parity_family.py compare bits.
"""

import functools
import hashlib
from itertools import product

import hf
import PIL
import pytest
import relatives
import torch
from paths import PILLOW, REFERENCE
from safetensors.torch import load_file

import minillava
from minillava.generate.generation import generate

pytestmark = pytest.mark.numeric

COUNTERPART = {"eager": "eager", "fused": "sdpa"}
CASES = list(product(relatives.KINDS, COUNTERPART))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """`opened(kind, dtype, attention)`: the stored network."""
    folder = functools.cache(
        lambda kind: relatives.stored(tmp_path_factory.mktemp(kind) / kind, kind)
    )
    return functools.cache(
        lambda kind, dtype="float32", attention="eager": minillava.load(
            folder(kind), device="cpu", dtype=dtype, attention=attention
        )
    )


@functools.cache
def exact() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / "relatives.safetensors")


def shown(assistant, asked: dict):
    """The question's pictures. Skips where another Pillow than that of the stored numbers makes
    other pixels of them: resizing, it may round the last grey level otherwise."""
    found = assistant.image_processor(
        [REFERENCE / "pictures" / f"{name}.png" for name in asked["pictures"]]
    )
    if digests(found) != asked["pixels"] and PIL.__version__ != PILLOW:
        pytest.skip(f"Pillow {PIL.__version__} resizes otherwise than {PILLOW}")
    return found


def digests(pictures) -> list[str]:
    """One of each picture's pixels."""
    found = [getattr(each, "pixels", each) for each in pictures]
    # transformers fills shorter stacks of tiles up with zeros
    most = max(map(len, found))
    found = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in found]
    return [hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for x in found]


@torch.no_grad()
def tensors(assistant, kind: str) -> dict[str, torch.Tensor]:
    """Ours of every stored tensor, under its stored name."""
    found, model = {}, assistant.model
    for number, asked in enumerate(relatives.facts()[kind]["questions"]):
        pixels = shown(assistant, asked)
        spliced = model.splice([asked["input_ids"]], pixels)
        out = model.language_model(spliced.embeds, spliced.padding_mask, hidden_states=True)
        found[f"{number}.projected"] = torch.cat(list(model.encode_images(pixels)))
        found[f"{number}.hidden"] = out.hidden_states[-1][0]
        found[f"{number}.logits"] = out.logits[0, -4:]
    return found


@pytest.mark.parametrize("attention", COUNTERPART)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", relatives.KINDS)
def test_every_tensor_is_as_close_to_float64_as_transformers(opened, kind, dtype, attention):
    """A part that LLaVA-1.5 has not, a bias, a second norm, tiles, would be left out or lose
    digits."""
    theirs = relatives.facts()[kind]["errors"][dtype][COUNTERPART[attention]]
    ours = tensors(opened(kind, dtype, attention), kind)
    assert ours.keys() == theirs.keys()
    far = {
        key: (hf.error(x, exact()[f"{kind}.{key}"])["max"], 2 * theirs[key]["max"])
        for key, x in ours.items()
    }
    assert not {k: pair for k, pair in far.items() if not pair[0] <= pair[1]}, "(found, allowed)"


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_greedy_ids(opened, kind, attention):
    """An answer after one or two pictures would differ from transformers'."""
    assistant = opened(kind, attention=attention)
    for asked in relatives.facts()[kind]["questions"]:
        pixels = shown(assistant, asked)
        answer = generate(assistant.model, [asked["input_ids"]], pixels, max_new_tokens=8)
        assert answer.sequences.tolist() == [asked["greedy"]]


@pytest.mark.parametrize("kind", relatives.KINDS)
def test_prompts_ids_and_pixels(opened, kind):
    """A prompt would be cut into other tokens, or a picture into other tiles, than transformers
    makes."""
    assistant = opened(kind)
    for asked in relatives.facts()[kind]["questions"]:
        assert assistant.tokenizer.encode(asked["prompt"]) == asked["input_ids"]
        assert digests(shown(assistant, asked)) == asked["pixels"]
