"""Options by name, as in `ask(..., temperature=1)`; a wrong name gets a hint at what it may have
meant."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from minillava.options import Options

OPTION_HINTS = {
    "do_sample": "set temperature above 0 to sample (1.0 changes nothing)",
    "max_length": "max_new_tokens counts the answer's tokens alone",
    "record": "minillava.generate.generate records",
    "return_dict_in_generate": "minillava.generate.generate has record=",
    "output_scores": "minillava.generate.generate has record=",
    "output_attentions": "minillava.generate.generate has record=",
    "output_hidden_states": "minillava.generate.generate has record=",
    "logits_processor": "process=f changes scores",
    "stop_strings": "stop takes texts",
    "contrast": "ask and stream of an Assistant contrast, and generate() with second=",
    "second": "ask and stream make the second row themselves; minillava.generate.generate takes it",
    "n": "num_return_sequences is how many answers generate() returns",
    "images": "pictures come before the question",
    "draft_tokens": "draft=assistant.drafts(name, tokens) says how many are guessed",
    "assistant_model": "draft takes a folder",
    "prompt_lookup_num_tokens": 'draft="lookup" looks words up in the prompt',
}
"""What people who know other libraries ask for, and what does it here."""

LOAD_HINTS = {
    "torch_dtype": "dtype is its name here",
    "device_map": "device names the one that holds the whole model",
    "load_in_8bit": 'set quantize="int8"',
    "load_in_4bit": 'set quantize="int4"',
    "load_8bit": 'set quantize="int8"',
    "load_4bit": 'set quantize="int4"',
    "attn_implementation": "attention is fused or eager",
    "model_path": "the weights come first, without a name",
    "pretrained_model_name_or_path": "the weights come first, without a name",
    "conv_mode": "template is its name here",
    "trust_remote_code": "no code of a checkpoint is ever run",
    "local_files_only": "nothing is downloaded, so leave it out",
}
"""What `load` is asked for by people who know other libraries, and what does it here."""


def check_names(given: Mapping[str, Any], known: Collection[str], other: Mapping[str, str]) -> None:
    """Raises TypeError for a name that is not known, with the hint in `other` or the nearest known
    name."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.5)
            hint = other.get(name) or (
                f"did you mean {near[0]}?" if near else f"expected some of: {', '.join(known)}"
            )
            raise TypeError(f"there is no option {name!r}: {hint}")


def read_options(given: Mapping[str, Any], others: Options | None = None) -> Options:
    """Options by name, the rest as in `others`. Raises TypeError for a name that is not known and
    ValueError for values out of range."""
    check_names(given, Options.__dataclass_fields__, OPTION_HINTS)
    return Options(**given) if others is None else replace(others, **given)
