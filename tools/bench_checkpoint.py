"""Checkpoints of true size with random weights, in the hub's layout, for tools/bench.py."""

import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from byte_tokenizer import CHATML, byte_level, pairs_of

from minillava.checkpoint.config_json import SO400M, read_config
from minillava.checkpoint.write_json import hub_config, preprocessor_config
from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig, VisionConfig
from minillava.files.tensors import INDEX_NAME
from minillava.files.tokenizer_files import FAST_NAME
from minillava.image import ImageProcessor
from minillava.llava import Llava

# hidden size, feed-forward size, layers, heads
SIZES = {
    "toy": (64, 128, 2, 4),
    "0.04b": (384, 1024, 8, 6),
    "0.13b": (768, 2048, 12, 12),
    "0.5b": (1280, 3456, 24, 20),
    "1b": (2048, 5632, 22, 16),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
TOY_CLIP = VisionConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)
TOKENIZER = Path(__file__).resolve().parents[1] / "weights" / "shapes" / "tokenizer.model"
SHARD = 2e9  # bytes
PIECES = 32000  # of Llama's tokenizer
BYTE_PIECES = 151643  # of Qwen2's
SHAPES = "shapes"  # the size of the bundled model, which is there already
INTERLEAVE = "interleave-0.5b"
SIZES |= {INTERLEAVE: (1024, 2816, 24, 16)}  # of llava-hf/llava-interleave-qwen-0.5b-hf


def config_of(size: str) -> LlavaConfig:
    if size == SHAPES:
        return read_config(TOKENIZER.parent)
    if size == INTERLEAVE:
        return interleave(*SIZES[size])
    hidden, feed_forward, layers, heads = SIZES[size]
    text = TextConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32064,  # as llava-hf pads it
        max_position_embeddings=4096,
    )
    return LlavaConfig(
        vision=CLIP_LARGE_336 if hidden >= CLIP_LARGE_336.hidden_size else TOY_CLIP, text=text
    )


def interleave(hidden: int, feed_forward: int, layers: int, heads: int) -> LlavaConfig:
    """SigLIP and a Qwen2 whose head is its table. Its tokens are those of Qwen2's tokenizer."""
    text = TextConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=152000,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
        qkv_bias=True,
    )
    end, image = BYTE_PIECES + CHATML.index("<|im_end|>"), BYTE_PIECES + CHATML.index("<image>")
    return LlavaConfig(
        vision=SO400M,
        text=text,
        feature_layer=-1,
        image_token_id=image,
        eos_token_ids=(end, BYTE_PIECES),
        pad_token_id=BYTE_PIECES,
        image_aspect_ratio="squash",
    )


def random_tensors(config: LlavaConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its name on the hub, float32, one after the other. A product
    has outputs of about the size of its inputs, so that logits stay finite and no number is
    denormal, with which a processor is slow."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llava(config).state_dict().items()}
    # transformers builds CLIP to its end; minillava leaves out the last block.
    last = config.vision.num_hidden_layers - 1
    for name, shape in list(shapes.items()):
        if name.startswith("vision_tower.encoder.layers.0."):
            shapes[name.replace("layers.0.", f"layers.{last}.")] = shape
    for part in ("weight", "bias"):
        shapes[f"vision_tower.post_layernorm.{part}"] = torch.Size([config.vision.hidden_size])
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        tensor = random_tensor(name, shape, generator)
        part, _, rest = name.partition(".")
        yield PREFIXES[part, rest.startswith("lm_head.")] + rest, tensor


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A parameter of our name, float32, on the generator's device."""
    if len(shape) == 1:
        return torch.full(
            shape, float("norm" in name and name.endswith("weight")), device=generator.device
        )
    width = 50 if "embed" in name else math.prod(shape[1:])
    return torch.empty(shape, device=generator.device).normal_(0, width**-0.5, generator=generator)


PREFIXES = {
    ("vision_tower", False): "vision_tower.vision_model.",
    ("projector", False): "multi_modal_projector.",
    ("language_model", False): "language_model.model.",
    ("language_model", True): "language_model.",
}


def make_checkpoint(folder: Path, size: str, dtype: torch.dtype) -> None:
    """Write the checkpoint unless it exists. It is written under a temporary name first, so that
    one that exists is whole."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config, shard, index = config_of(size), {}, {}

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, partial / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in random_tensors(config):
        shard[name] = tensor.to(dtype)
        if sum(t.nbytes for t in shard.values()) > SHARD:
            flush()
    flush()
    (partial / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (partial / "config.json").write_text(json.dumps(hub_config(config, dtype)))
    (partial / "preprocessor_config.json").write_text(
        json.dumps(preprocessor_config(processor_of(config)))
    )
    if config.vision.siglip:
        written = byte_level(CHATML, pairs_of(BYTE_PIECES - 256))
        (partial / FAST_NAME).write_text(json.dumps(written), encoding="utf-8")
    else:
        make_tokenizer(partial)
    partial.rename(folder)


def processor_of(config: LlavaConfig) -> ImageProcessor:
    even = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if config.vision.siglip else {}
    return ImageProcessor(config.vision.image_size, config.image_aspect_ratio, **even)


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of the size of Llama's, so that opening it takes as long. It has the bundled
    model's pieces, and after them pieces that no text contains: a SentencePiece file may be
    continued by appending to it. Rows of the table after the last token are padding."""
    count = SentencePieceProcessor(model_file=str(TOKENIZER)).vocab_size()
    more = b"".join(piece(f"<{i}>".encode(), -float(i)) for i in range(count, PIECES))
    (folder / TOKENIZER.name).write_bytes(TOKENIZER.read_bytes() + more)
    names = {"<image>": PIECES, "<pad>": PIECES + 1}
    (folder / "added_tokens.json").write_text(json.dumps(names))


def piece(text: bytes, score: float) -> bytes:
    """One more piece as protobuf writes it: field 1 of the model, of which field 1 is the text and
    field 2 the score."""
    inside = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + bytes([len(inside)]) + inside
