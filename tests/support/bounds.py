"""How far a right answer may lie from the exact one, on any processor.

Floating point rounds each operation: the computer's x + y is (x + y)(1 + d) with |d| <= u, and u is
half of torch.finfo(dtype).eps. What a kernel is free to choose is the order of its sums, so two
right kernels differ, and how much larger the error of one is than the error of another is luck.
What none of them can exceed follows from u and from the inputs alone (Higham, Accuracy and
Stability of Numerical Algorithms, chapters 3 and 4). Each function here returns a pair: the exact
value in float64, and such a bound, number by number.

float16 and bfloat16 are inputs and outputs only: every kernel that torch has for them adds up in
float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# the fastest exp in torch is that many units in the last place off, and says so in its name
EXP = 20


def unit(dtype: torch.dtype) -> float:
    """u: rounding to nearest moves a number by at most this part of it."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """(1 + d1)...(1 + dn) is at most this far from 1: n roundings in a row, each by at most u."""
    return n * unit(dtype) / (1 - n * unit(dtype))


def sums_in(dtype: torch.dtype) -> torch.dtype:
    """What a kernel adds up in."""
    return torch.promote_types(dtype, torch.float32)


def rounded(exact: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound after one more rounding, to dtype; numbers near zero lose up to the smallest there
    is."""
    return (
        bound
        + unit(dtype) * (exact.abs() + bound)
        + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )


def products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    dx=0.0,
    dw=0.0,
) -> tuple[Tensor, Tensor]:
    """x·weightᵀ + bias, x [..., C], weight [N, C], bias [N] -> exact and bound, both float64 [...,
    N].

    A sum of C products, in any order, fused or not, is off by at most gamma(C) · |x|·|w|. dtype: of
    the result, by default that of x. dx, dw: by how much a kernel may have rounded x and the weight
    before it multiplies.
    """
    dtype = dtype or x.dtype
    sums, x, weight = sums_in(dtype), x.double(), weight.double()
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    largest = (x.abs() + dx) @ (weight.abs() + dw).T
    # The last terms: the exact value is a sum in float64 itself, and some instructions turn tiny
    # numbers into zero.
    bound = (largest - size) + (
        gamma(x.shape[-1], sums) + gamma(x.shape[-1], torch.float64)
    ) * largest
    bound = bound + x.shape[-1] * torch.finfo(sums).tiny
    bound = rounded(exact, bound, dtype)
    if bias is None:
        return exact, bound
    exact = exact + bias.double()
    return exact, rounded(exact, bound, dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scores_in: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ / √D)·v, q [B,H,T,D], k and v [B,K,S,D], mask [B|1,1,T,S], every query seeing
    something.

    scores_in: where a kernel stores the scores; by default it keeps them in what it adds up in. An
    error e of a score multiplies its exponential by exp(e), and the sum that divides it by no more;
    so a weight is off by a factor of at most exp(2 e), and of the roundings of the exponentials,
    their sum and the division.
    """
    dtype, sums = q.dtype, sums_in(q.dtype)
    q, k, v = (
        q.double(),
        *(x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)),
    )
    keys, width = k.shape[2:]
    scale = width**-0.5
    scores, size = q @ k.mT * scale, q.abs() @ k.abs().mT * scale  # [B, H, T, S]
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    # Two roundings for the scale, which is rounded itself; two more if what is stored is rounded
    # before and after it.
    off = gamma(width + 2, sums) * size + 2 * unit(scores_in or sums) * size
    # the largest score is subtracted first, perhaps block by block
    off = off + 4 * unit(sums) * scores.abs()
    off = off.masked_fill(~seen, 0).amax(-1, keepdim=True)  # [B, H, T, 1]
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    factor = (
        torch.expm1(2 * off)
        + 4 * EXP * torch.finfo(sums).eps
        + gamma(2 * keys, sums)
        + 2 * unit(dtype)
    )
    exact, weighed = weights @ v, weights @ v.abs()
    # a small weight, stored, may become zero
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return exact, rounded(exact, factor * weighed + tiny * v.abs().sum(2, keepdim=True), dtype)


def assert_within(found: Tensor, exact_and_bound: tuple[Tensor, Tensor], what: object = "") -> None:
    """Each number is as near to the exact one as its bound says; NaN never is."""
    exact, bound = exact_and_bound
    found = found.detach()
    assert found.shape == exact.shape, (what, found.shape, exact.shape)
    errors = (found.double() - exact).abs()
    inside = errors <= bound
    worst = (errors / bound)[~inside]
    assert inside.all(), (
        f"{what}: {len(worst)} of {inside.numel()} numbers are farther off than rounding explains, "
        f"the worst by {worst.max():.3g} times"
    )


# --- a whole network ------------------------------------------------------------------------------
#
# From layer to layer, certain bounds multiply until they allow everything. Two measures that do
# not:


def assert_same_in_float64(found: Tensor, expected: Tensor, what: object = "") -> None:
    """Two float64 runs of one network that add up in different orders agree to float32's precision.

    Rounding in float64 is 2^29 times smaller than that. A network would have to amplify it five
    hundred million times to fail here, and one that did could not be run in float32 at all; a
    mistake would have to be invisible in float32 to pass.
    """
    assert found.dtype == expected.dtype == torch.float64, what
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    cut = expected == -math.inf  # scores behind a filter
    assert torch.equal(found == -math.inf, cut), what
    found, expected = found[~cut], expected[~cut]
    off = float((found - expected).detach().abs().max() / expected.detach().abs().max())
    assert off <= torch.finfo(torch.float32).eps, (
        f"{what}: differ by {off:.3g} of the largest number"
    )


@torch.no_grad()
def network(
    model: nn.Module,
    run: Callable[[], dict[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    runs: int = 4,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `run` computes with a float64 model, and for each tensor how far a run in dtype may be
    off: one number.

    The run is repeated with an error in every layer's every output, of random sign; in linear
    layers as large as `products` allows, C roundings that all push one way, and in the others a few
    roundings. Real roundings push either way, so that a sum's error is about √C of them: a right
    kernel does not come near.
    """
    exact = run()
    assert all(x.dtype == torch.float64 for x in exact.values())
    signs = torch.Generator().manual_seed(0)

    def err(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        linear = isinstance(layer, nn.Linear)
        bound = (
            products(inputs[0], layer.weight, layer.bias, dtype)[1]
            if linear
            else gamma(4, dtype) * output.abs()
        )
        return output + bound * (torch.randint(0, 2, bound.shape, generator=signs) * 2 - 1)

    hooks = [m.register_forward_hook(err) for m in model.modules() if not list(m.children())]
    try:
        noisy = [run() for _ in range(runs)]
    finally:
        for hook in hooks:
            hook.remove()
    largest = {
        name: max(float((made[name] - x).abs().max()) for made in noisy)
        for name, x in exact.items()
    }
    return {name: (x, torch.full_like(x, largest[name])) for name, x in exact.items()}
