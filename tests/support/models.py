"""Small networks: the stored checkpoints, and ones of random numbers."""

from dataclasses import replace
from pathlib import Path

import torch
from paths import REFERENCE

import minillava
from minillava.assistant import Assistant
from minillava.attention import fused
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.llava import Llava

TINY_VISION = VisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
TINY_TEXT = TextConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def stored(name: str | Path = "plain", dtype: str = "float32", **settings) -> Assistant:
    """One of tests/reference/ ("plain", "grouped" with shared heads, "tied" with a shared table),
    or of a folder, on the CPU."""
    return minillava.load(REFERENCE / name, device="cpu", dtype=dtype, **settings)


def tiny(vocabulary: int = 50, seed: int = 0, attend=fused, **settings) -> Llava:
    """Random weights, large enough that tokens differ; in float64, where differences of order and
    differences of value lie far apart (see bounds.py). `settings` are fields of LlavaConfig."""
    torch.manual_seed(seed)
    config = LlavaConfig(TINY_VISION, replace(TINY_TEXT, vocab_size=vocabulary), **settings)
    model = Llava(config, attend).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return model
