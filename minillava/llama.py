"""The Llama decoder (Touvron et al. 2023): vectors in, next-token logits out.

B batch, T new tokens, S cached and new tokens, C width, H heads, K key/value heads, D head width,
F feed-forward width, L layers, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.attention import eager
from minillava.cache import KVCache
from minillava.config import TextConfig


@dataclass
class LanguageOutput:
    logits: Tensor  # [B, T, V]; [B, 1, V] with last_only; [N, V] with at
    # L + 1 times [B, T, C]: embeddings, then each layer
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None  # L times [B, H, T, S]
    hidden: Tensor | None = None  # [B, T, C], [B, 1, C] or [N, C]: what the head read


def upcast(logits: Tensor) -> Tensor:
    """Float32 or better. What follows divides, exponentiates and sums over the whole vocabulary; in
    half precision it would round tokens into ties that the model did not mean. transformers copies
    to float32 at the same place."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Context(NamedTuple):
    """What every layer is told beside its input."""

    cos: Tensor  # [B|1, 1, T, D]
    sin: Tensor  # [B|1, 1, T, D]
    mask: Tensor | None  # bool [B|1, 1, T, S]
    causal: bool
    attend: Callable[..., Any]
    cache: KVCache | None


class LanguageModel(nn.Module):
    one_by_one = False  # True: guesses are read as steps of their own (fast/row_by_row.py)
    # in a pass of up to so many rows, each has the bits that it has alone; None: not known (fast/)
    alike: int | None = None
    # attention of several queries, each with the bits that it has alone, if there is such a way
    each_alone: Callable[..., Any] | None = None

    def __init__(self, config: TextConfig, attend: Callable[..., Any]):
        super().__init__()
        self.config, self.attend = config, attend
        table = torch.zeros(config.vocab_size, config.hidden_size)  # zeros: see vision.py
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderBlock(config, i) for i in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        inputs: Tensor,
        padding_mask: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        at: Tensor | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        attend: Callable[..., Any] | None = None,
    ) -> LanguageOutput:
        """Token ids [B,T] or embeddings [B,T,C] -> logits.

        padding_mask: bool [B,T] of the new tokens, False where padding. cache: what came before; it
        gains the new ones. last_only: the head runs on the last position alone (on a whole prompt
        it costs two thirds of a layer, and T rows of V logits). at, bool [B,T]: on these N alone.
        attentions: recorded by `eager`, which alone has them. positions [B|1,T] and mask bool
        [B|1,1,T,S] go together (else ValueError): for guesses, which are not one sequence.
        """
        if (positions is None) != (mask is None):
            raise ValueError("positions and mask go together: give both, or neither")
        x = inputs if inputs.is_floating_point() else self.embed_tokens(inputs)  # [B, T, C]
        attend = attend or (eager if attentions else self.attend)
        context = self._context(x, padding_mask, cache, positions, mask, attend)
        states, weights = [], []
        for layer in self.layers:
            if hidden_states:
                states.append(x)
            x, w = layer(x, context)  # [B, T, C], [B, H, T, S] or None
            if attentions:
                weights.append(w)
        if cache is not None:
            cache.advance(x.shape[1])
        x = self.norm(x)
        states.append(x)  # the last hidden state is the normalised one, as transformers reports it
        x = x[:, -1:] if last_only else x if at is None else x[at]
        return LanguageOutput(
            self.head(x),
            tuple(states) if hidden_states else None,
            tuple(weights) if attentions else None,
            x,
        )

    def _context(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        cache: KVCache | None,
        positions: Tensor | None,
        mask: Tensor | None,
        attend: Callable[..., Any],
    ) -> Context:
        """What every layer is told of the new tokens x [B,T,C]."""
        offset, length, causal = 0, x.shape[1], False
        if cache is not None:
            offset, padding_mask = cache.length, cache.reserve(len(x), length, padding_mask)
        if positions is None:  # padding_mask [B, S] or None
            positions, mask, causal = positions_and_mask(padding_mask, offset, length, x.device)
        tables = rotary_tables(positions, self.config, x.dtype)
        return Context(*tables, mask, causal, attend, cache)

    def run(self, function: Callable[..., Any], x: Tensor, caches: Any, *rest: Any) -> Any:
        """function(self, x, caches, *rest), a pass that is written in another file. It is a method
        so that a model in several processes can run it in all of them (fast/parallel.py)."""
        return function(self, x, caches, *rest)

    def head(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., V]"""
        if self.config.tie_word_embeddings:
            return F.linear(x, self.embed_tokens.weight)
        return self.lm_head(x)


def positions_and_mask(
    padding_mask: Tensor | None, offset: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None, bool]:
    """Where each new token stands, and what it may look at: (positions [B|1,T], mask [B|1,1,T,S] or
    None, causal). padding_mask: bool [B,S] over cached and new tokens, None if nothing is padding.

    A token sees itself and what came before it, never padding. Two cached and three new tokens of a
    row that begins with one of padding (x: may look, S = offset + T):

                   padding  cached │ new
        position      0        0   │ 1  2  3
        new 1         .        x   │ x  .  .
        new 2         .        x   │ x  x  .
        new 3         .        x   │ x  x  x

    Nothing cached, no padding: a plain triangle, which the attention functions draw themselves
    (causal). One new token, no padding: it may see everything, so there is nothing to mask. All
    else gets the mask written out: the causal flag draws its triangle from the upper left, as if
    the first new token stood at position 0 instead of `offset`.
    """
    query = torch.arange(offset, offset + length, device=device)  # [T]
    if padding_mask is None and (offset == 0 or length == 1):
        return query[None], None, length > 1
    key = torch.arange(offset + length, device=device)  # [S]
    mask = (key <= query[:, None])[None, None]  # [1, 1, T, S]
    if padding_mask is None:
        return query[None], mask, False
    # Padding is on the left, and positions count real tokens only: a padded row gets the same
    # rotary angles as it would alone. A padded query looks at itself, so that no row of the softmax
    # is empty.
    positions = (padding_mask.cumsum(-1) - 1).clamp(min=0)[:, offset:]  # [B, T]
    mask = (mask & padding_mask[:, None, None, :]) | (key == query[:, None])  # [B, 1, T, S]
    return positions, mask, False


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang & Sennrich 2019): layer norm without the mean and the bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        # In float32, since squares of half-precision numbers overflow or vanish; rounded back
        # before the weight multiplies it, since the other order gives other bits than transformers.
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)  # the mean is [B, T, 1]
        return self.weight * y.to(x.dtype)


def rotary_tables(
    positions: Tensor, config: TextConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles (Su et al. 2021). positions [B|1,T] -> two of
    [B|1,1,T,D].

    Computed in float32 and rounded once at the end: at position 4000 a bfloat16 angle is off by
    whole turns.
    """
    d = config.head_dim
    exponents = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device) / d
    # [D/2] angles per position, from 1 radian for the first pair down to about 1 / theta
    inv_freq = 1.0 / config.rope_theta**exponents / config.rope_factor
    angles = positions[..., None].float() * inv_freq  # [B|1, T, D/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [B|1, 1, T, D]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x [B, H or K, T, D], cos and sin
    [B|1,1,T,D].

    This is the half-split pairing of transformers' checkpoints; Meta pairs neighbours (2i, 2i + 1).
    """
    first, second = x.chunk(2, dim=-1)  # [B, H or K, T, D/2]
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); only attention looks at other positions.

    x ─┬─ input_layernorm ─ self_attn ─ + ─┬─ post_attention_layernorm ─ mlp ─ + ─▶ x
       └────────────────────────────────┘  └───────────────────────────────────┘
    """

    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        out, weights = self.self_attn(self.input_layernorm(x), context)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class Attention(nn.Module):
    """Causal attention, rotary; query heads share key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim  # H·D
        keys = config.num_key_value_heads * config.head_dim  # K·D
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=False)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """x [B,T,C] -> output [B,T,C] and, from `eager`, the attention weights [B,H,T,S]."""
        q, k, v = (
            # [B, T, C] -> [B, H or K, T, D]
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (apply_rotary(each, context.cos, context.sin) for each in (q, k))
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)  # [B, K, S, D]
        out, weights = context.attend(q, k, v, context.mask, context.causal)  # [B, H, T, D]
        # [B, H, T, D] -> [B, T, H·D] -> [B, T, C]
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # [B, T, C] -> [B, T, F] -> [B, T, C]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
