"""The same numbers sooner. The files of the reading order do not need this folder to be
understood."""

from minillava.fast.attention import fused
from minillava.fast.linear import use_fast_linear
from minillava.llava import Llava


def speed_up(model: Llava) -> None:
    """Let a model compute its matrix products and its attention by the ways that this processor
    does fastest; weights and names stay.

    They add up in another order, so the last digits differ. `attention="eager"` promises those of
    transformers to the last bit, and so its model is left as it was built."""
    use_fast_linear(model)
    model.language_model.attend = fused
