"""The same numbers sooner. Except for the calls in assistant.py, the files of the reading order can
be understood without this folder."""

from torch import nn

from minillava.fast import processor
from minillava.fast.attention import fused
from minillava.fast.linear import NAMES, FastLinear, use_fast_linear
from minillava.fast.quantize import quantised_kinds
from minillava.llama import LanguageModel


def speed_up(model: nn.Module, language: LanguageModel) -> None:
    """Let a model, with `language` in it, compute its matrix products and its attention by the ways
    that this processor does fastest; weights and names stay.

    They add up in another order, so the last digits differ. `attention="eager"` promises those of
    transformers to the last bit, and so its model is left as it was built."""
    use_fast_linear(model)
    language.attend, language.each_alone = fused, fused.each_alone
    # A few rows may have the bits of one by luck; what is not claimed is not so.
    weights = [each.weight for each in language.modules() if isinstance(each, FastLinear)]
    if language.config.tie_word_embeddings:
        weights.append(language.embed_tokens.weight)  # the head's, whatever the layers' are
    narrow = {NAMES.get(w.dtype) for w in weights if w.device.type == "cpu"} & {"bfloat16"}
    stored = narrow.union(quantised_kinds(language) if language.norm.weight.is_cpu else [])
    if stored:
        claimed = processor.SAME_ROWS.get(processor.kind(), {})
        language.alike = min(claimed.get(each, 1) for each in stored)
