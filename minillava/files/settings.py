"""The checks of an answer's settings, each alone and together. This module imports nothing
large."""

import math
from dataclasses import Field
from typing import Any


def check_range(setting: Field[Any], value: Any) -> None:
    """Raises ValueError if a setting, or one of several seeds, is not a number in its range."""
    if "range" not in setting.metadata or value is setting.default is None:
        return
    low, high = setting.metadata["range"]
    whole = "float" not in setting.type
    several = isinstance(value, tuple) and "Sequence" in setting.type
    for number in value if several else (value,):
        check_number(setting.name, number, low, high, whole)


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError, with the setting's name, for what is not a number from `low` to `high`."""
    fits = isinstance(value, int if whole else (int, float))
    if not fits or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        limit = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise ValueError(f"{name} is {value!r}, expected {kind} {limit}")


def check_sampling(options: Any) -> None:
    """Raises ValueError for settings of sampling without a temperature, and for other settings that
    do not go together."""
    for name in ("top_p", "typical_p"):
        if vars(options)[name] == 0:
            raise ValueError(f"{name} is 0, expected a number above 0: no token would be left")
    if 0 < options.temperature < 1e-6:
        raise ValueError(
            f"temperature is {options.temperature}, expected 0 (greedy) or at least 1e-6"
        )
    filters = options.top_k or options.min_p or {options.top_p, options.typical_p} - {None, 1}
    several = options.num_return_sequences > 1 and options.num_beams == 1
    if options.temperature == 0 and (filters or several):
        raise ValueError(
            "top_k, top_p, min_p, typical_p and num_return_sequences (without beams) are about "
            "samples: set a temperature above 0 (1.0 changes nothing)"
        )


def check_beams(options: Any) -> None:
    """Raises ValueError for settings of beams without beams, and for settings that do not go with
    beams."""
    if not isinstance(options.early_stopping, bool) and options.early_stopping != "never":
        raise ValueError(
            f'early_stopping is {options.early_stopping!r}, expected False, True or "never"'
        )
    if options.num_beams == 1 and (options.length_penalty != 1 or options.early_stopping):
        raise ValueError("length_penalty and early_stopping are about beams: set num_beams above 1")
    if 1 < options.num_beams < options.num_return_sequences:
        raise ValueError(
            f"num_return_sequences is {options.num_return_sequences}, but num_beams is "
            f"{options.num_beams}: beams return no more answers than there are beams"
        )
