"""CLIP's vision transformer (Radford et al. 2021), or SigLIP's: one vector per patch of a picture.

n pictures, R side in pixels, P patches, N = P + 1 with the class token, C width, H heads, D head
width, F feed-forward width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import LlavaConfig, VisionConfig


class VisionTower(nn.Module):
    """CLIP up to the layer whose features LLaVA uses.

    LLaVA-1.5 takes the output of the last block but one (feature layer -2): the last one gathers
    everything into the class token for matching captions, and its patches lose local detail. So it
    and CLIP's final `post_layernorm` are neither built nor loaded here.
    """

    def __init__(self, config: LlavaConfig, attend: Callable[..., Any]):
        super().__init__()
        c = self.config = config.vision
        self.first = int(not (c.siglip or config.keep_class_token))
        self.embeddings = Embeddings(c)
        norm = nn.Identity() if c.siglip else nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.pre_layrnorm = norm  # CLIP's spelling
        self.encoder = Encoder(c, config.feature_depths, attend)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, R, R] -> [n, P or N, d·C]: patches of d layers (LLaVA-1.5: 1), N with class token.
        Raises ValueError if the pictures have another size than the tower was trained on."""
        c, found = self.config, list(pixel_values.shape)
        expected = [c.num_channels, c.image_size, c.image_size]
        if found[1:] != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"pixel_values have shape {found}, expected [n, {shape}]")
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))  # [n, N, d·C]
        # The class token summarises the picture, for CLIP's captions; LLaVA wants places.
        return x[:, self.first :]  # [n, P or N, d·C]


class Embeddings(nn.Module):
    """Patches to vectors: one convolution whose stride is its kernel, class token, positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size, width = config.patch_size, config.hidden_size
        self.class_embedding = None if config.siglip else nn.Parameter(torch.zeros(width))  # [C]
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=size, stride=size, bias=config.siglip
        )
        # Zeros instead of nn.Embedding's random start: the values come from a checkpoint, and
        # drawing random numbers on the meta device costs a second of imports.
        table = torch.zeros(config.num_positions, width)  # [N, C]
        self.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(pixel_values)  # [n, C, √P, √P]
        x = x.flatten(2).transpose(1, 2)  # [n, P, C], row by row from the top left
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [n, N, C]
        return x + self.position_embedding.weight


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig, depths: Sequence[int], attend: Callable[..., Any]):
        super().__init__()
        self.depths = depths
        self.layers = nn.ModuleList(VisionBlock(config, attend) for _ in range(max(depths)))

    def forward(self, x: Tensor) -> Tensor:
        """[n, N, C] -> what is there after each of d depths, side by side: [n, N, d·C]."""
        taken = {0: x}
        for i, layer in enumerate(self.layers, 1):
            x = layer(x)
            if i in self.depths:
                taken[i] = x
        # One stays as it lies in memory, which can decide the last bit of what is made of it.
        found = [taken[depth] for depth in self.depths]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, attend: Callable[..., Any]):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, attend)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Every patch looks at every patch: no mask, and positions were added at the start."""

    def __init__(self, config: VisionConfig, attend: Callable[..., Any]):
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.attend = config.num_attention_heads, attend
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            # [n, N, C] -> [n, H, N, D]
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, _ = self.attend(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [n, H, N, D] -> [n, N, C]


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = partial(F.gelu, approximate="tanh") if config.siglip else quick_gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # [n, N, C] -> [n, N, F] -> [n, N, C]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI trained CLIP with this cheap stand-in for GELU; the projector uses the exact one. They
    differ by up to 0.02, enough to change an answer, so neither can replace the other."""
    return x * torch.sigmoid(1.702 * x)
