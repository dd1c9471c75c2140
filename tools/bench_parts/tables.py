"""The tables of compare, in Markdown."""

import statistics
from collections.abc import Sequence

from bench_parts.clock import BUSY, TRIES
from bench_parts.compare import Asked, Measured
from bench_parts.work import bytes_read, cache_size, operations
from minillava.fast.packed import KIND as PACKED

COLUMNS = (
    "start to first token, s", "open, s", "cold, s", "peak GB", "picture, s", "prompt, s", "of rate",
    "tokens/s", "spread", "of bandwidth", "GB/s", "others", "stolen",
)  # fmt: skip


def table(rows: Sequence[Measured], asked: Asked) -> str:
    """Fractions are of what the machine did at most right before each process: of the rate in
    reading the prompt, of the bandwidth in decoding."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for each in rows:
        if not each.rounds:
            cells = [f"died: {each.failed.replace('|', '/')}", *[""] * (len(COLUMNS) - 1)]
            lines.append(f"| {each.row} | {' | '.join(cells)} |")
            continue
        mark = " !" * each.disturbed
        died = f" (died in a later round: {each.failed.replace('|', '/')})" if each.failed else ""
        lines.append(f"| {each.row}{mark}{died} | {' | '.join(cells_of(each, asked))} |")
    if any(each.disturbed for each in rows):
        lines += ["", f"!: in each of {TRIES} tries, or until the time was over, others took more "
                      f"than {BUSY} cores from it."]  # fmt: skip
    return "\n".join(lines)


def cells_of(each: Measured, asked: Asked) -> list[str]:
    process, opened, vision, step = (
        each.timing(key) for key in ("process", "open", "vision", "decode")
    )
    peak = max(found["peak"] for found in each.rounds.values())
    middle = {
        key: statistics.median(found[key] for found in each.rounds.values())
        for key in ("others", "stolen")
    }
    probed = statistics.median(found["limits"]["bandwidth"] for found in each.rounds.values())
    fractions = [fractions_of(each, found, asked) for found in each.rounds.values()]
    of_rate, of_bandwidth = (statistics.median(pair) for pair in zip(*fractions, strict=True))
    return [
        # it compiles at the second token, or at the first
        "" if each.row.compiled else seconds(process.median),
        seconds(opened.median),
        seconds(each.cold) if each.cold else "",
        f"{peak / 1e9:.2f}",
        seconds(vision.median) if vision else "",
        seconds(statistics.median(prompt_of(found) for found in each.rounds.values())),
        f"{of_rate:.0%}",
        f"{1 / step.median:.2f}",
        f"±{step.spread:.0%}" if len(step.seconds) > 1 else "",
        f"{of_bandwidth:.0%}",
        f"{probed / 1e9:.1f}",
        f"{middle['others']:.2f}",
        f"{middle['stolen']:.2f}",
    ]


def seconds(value: float) -> str:
    """A number with three digits."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def prompt_of(found: dict) -> float:
    return found["first"] - found["vision"]


def fractions_of(each: Measured, found: dict, asked: Asked) -> tuple[float, float]:
    """The fractions of the rate and of the bandwidth that were probed before this process."""
    most, dtype = found["limits"], each.row.dtype
    rate = most["rates"]["float32"] if dtype == "float32" else max(most["rates"].values())
    read = bytes_read(
        asked.config, dtype, found.get("width", 2), asked.positions + asked.tokens // 2
    )
    done = operations(asked.config, asked.positions)
    return done / prompt_of(found) / rate, read / found["decode"] / most["bandwidth"]


def ratios(rows: Sequence[Measured]) -> str:
    """The ratios of two rows: medians over the rounds. In a round the two follow each other, because
    the machine may be faster or slower in the next round."""
    heads = ("time from start to first token", "time of picture and prompt", "tokens/s")
    lines = [f"| ratio | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for ours, peer in pairs(rows):
        compiles = ours.row.compiled or peer.row.compiled  # in the midst of it
        cells = [
            "" if compiles else ratio(ours, peer, lambda found: found["process"]),
            # a peer that sees no picture has read as many positions of text
            ratio(ours, peer, lambda found: found["first"]),
            ratio(ours, peer, lambda found: 1 / found["decode"]),
        ]
        lines.append(f"| {ours.row} to {peer.row} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def pairs(rows: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    """The pairs that are compared, with as many threads: each row of ours with every peer of its
    precision, and smaller or packed weights with our bfloat16."""
    found = []
    for ours in rows:
        for other in rows:
            same = ours.row.precision == other.row.precision and other.row.peer != "minillava"
            other_form = ours.row.dtype in ("int8", "int4", PACKED) and (
                (other.row.peer, other.row.dtype) == ("minillava", "bfloat16")
                and other.row.compiled == ours.row.compiled
            )
            alike = ours.row.peer == "minillava" and ours.row.threads == other.row.threads
            if alike and (same or other_form) and ours.rounds.keys() & other.rounds.keys():
                found.append((ours, other))
    return found


def ratio(ours: Measured, peer: Measured, value) -> str:
    common = ours.rounds.keys() & peer.rounds.keys()
    return f"{statistics.median(value(ours.rounds[n]) / value(peer.rounds[n]) for n in common):.2f}"


def memory(rows: Sequence[Measured], asked: Asked) -> str:
    """Our memory, as a multiple of the weights and the cache that it has to hold."""
    lines = ["| peak memory, to 1.05 × weights + cache + 300 MB | |", "|---|---:|"]
    for each in rows:
        if each.row.peer == "minillava" and each.rounds:
            found = max(each.rounds.values(), key=lambda found: found["peak"])
            cache = cache_size(asked.config, asked.positions + asked.tokens) * found["width"]
            expected = 1.05 * found["weights"] + cache + 0.3e9
            lines.append(f"| {each.row} | {found['peak'] / expected:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""
