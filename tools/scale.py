"""The arithmetic of several devices and machines, from the numbers of a network: `python tools/scale.py`.

What it prints stands in minillava/fast/SCALE.md. Measured are only the speeds in MEASURED, each with
the place that has it; links and prices are inputs that a reader replaces by their own.
"""

import math
import sys
from pathlib import Path

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_checkpoint import config_of
from bench_parts.work import PROMPT, cache_size, weights_read

from minillava.config import TextConfig

SIZES = {size.upper(): config_of(size) for size in ("7b", "13b")}

# (name, bytes per second, seconds that one all-reduce of two takes at least). A link's rate is its
# nominal one; the latencies are those that its makers and users commonly state, not measured here.
LINKS = (
    ("10 Gb/s Ethernet", 10e9 / 8, 50e-6),
    ("100 Gb/s Ethernet", 100e9 / 8, 20e-6),
    ("400 Gb/s InfiniBand", 400e9 / 8, 10e-6),
    ("NVLink, 450 GB/s", 450e9, 5e-6),
)

# Seconds to the first token without opening the model, and tokens per second after it, of one
# answer at a time; where tools/MEASUREMENTS.md has them, and what such a machine costs an hour: an
# assumption, to be replaced by a bill.
MEASURED = {
    "two CPU cores, bfloat16": (2.87 + 53.92, 1.21, 'AVX2, "--size 7b"', 0.10),
    "one H100, captured, bfloat16": (0.0567, 151.6, '"the second run"', 3.00),
    "one H200, captured, bfloat16": (0.0605, 191.6, '"one H200"', 4.00),
}
# A server of two sockets: bytes per second that one of them reads from its own memory, eight
# channels of DDR5-4800 each at their nominal rate; and what is commonly stated of the link between
# two sockets, over which half of the weights come where processes are not bound. Not measured here.
SOCKETS, SOCKET, BETWEEN = 2, 8 * 4800e6 * 8, 100e9
# Seconds of a sum through gloo, from hopeful to what it took here with nothing else to do; between
# the layers of a model on two cores it took more.
GLOO = (50e-6, 150e-6, 500e-6)
COUNTS = (2, 4, 8)  # processes
TOKENS = 64  # of an answer
PICTURES = 1_000_000
LOADS = (0.1, 1.0, 10.0)  # requests per second
PATIENCE = 0.05  # of the requests may wait at all


def table(*rows: tuple) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def reduced_bytes(text: TextConfig, positions: int = 1) -> int:
    """Bytes of one sum over the processes: float32, as fast/parallel.py adds."""
    return 4 * text.hidden_size * positions


def sums_seconds(
    text: TextConfig, rate: float, least: float, count: int = 2, positions: int = 1
) -> float:
    """Seconds of a pass's sums over so many processes, two in each layer. A ring of n sends
    2 (n - 1) / n of the bytes from each, in n - 1 times the rounds of two."""
    sent = 2 * (count - 1) / count * reduced_bytes(text, positions)
    return 2 * text.num_hidden_layers * ((count - 1) * least + sent / rate)


def erlang_c(servers: int, offered: float) -> float:
    """The share of requests that wait in a queue M/M/c (Erlang 1917). offered: load in servers.
    The recursion of Erlang's B is exact and does not overflow, as factorials would."""
    blocked = 1.0
    for each in range(1, servers + 1):
        blocked = offered * blocked / (each + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def replicas(load: float, seconds: float) -> int:
    """The fewest replicas of which at most PATIENCE of the requests wait. load: requests per
    second, each of which takes one replica for so many seconds."""
    offered = load * seconds
    servers = math.floor(offered) + 1
    while erlang_c(servers, offered) > PATIENCE:
        servers += 1
    return servers


def bytes_per_token() -> str:
    rows: list[tuple] = [("", "weights, GB", "cache, GB", "a sum, KB", "sums, MB", "prompt's, MB")]
    for name, config in SIZES.items():
        text = config.text
        sums = 2 * text.num_hidden_layers
        rows.append(
            (
                name,
                f"{2 * weights_read(text) / 1e9:.2f}",
                f"{2 * cache_size(config, PROMPT) / 1e9:.2f}",
                f"{reduced_bytes(text) / 1e3:.1f}",
                f"{sums * reduced_bytes(text) / 1e6:.2f}",
                f"{sums * reduced_bytes(text, PROMPT) / 1e6:.0f}",
            )
        )
    return table(*rows)


def what_sums_take() -> str:
    rows: list[tuple] = [("", "of a token, ms", "of a prompt, ms")]
    for size, config in SIZES.items():
        for name, rate, least in LINKS:
            token = sums_seconds(config.text, rate, least)
            prompt = sums_seconds(config.text, rate, least, positions=PROMPT)
            rows.append((f"{size}, {name}", f"{1e3 * token:.2f}", f"{1e3 * prompt:.1f}"))
    return table(*rows)


def where_it_pays() -> str:
    """Each of n processes reads its part of the weights; what the sums take comes on top."""
    rows: list[tuple] = [("", *(f"{count} processes" for count in COUNTS))]
    text = SIZES["7B"].text
    for machine, (_, speed, _, _) in MEASURED.items():
        for name, rate, least in LINKS:
            gains = (
                1 / (1 / count + speed * sums_seconds(text, rate, least, count)) for count in COUNTS
            )
            rows.append((f"{machine}, {name}", *(f"{gain:.2f}" for gain in gains)))
    return table(*rows)


def by_sockets() -> str:
    """A token of one process that has one socket, or both with half of what it reads behind the
    link; and of a bound process on each, with the sums."""
    rows: list[tuple] = [("", "one socket", "both, unbound", *(f"{1e6 * s:.0f} µs" for s in GLOO))]
    for name, config in SIZES.items():
        read = 2 * (weights_read(config.text) + cache_size(config, PROMPT))
        # each socket's cores read a half of their weights from the other's memory
        unbound = max(read / SOCKETS / SOCKET, read / SOCKETS / 2 / BETWEEN)
        sums = (2 * config.text.num_hidden_layers * seconds for seconds in GLOO)
        times = (read / SOCKET, unbound, *(read / SOCKETS / SOCKET + each for each in sums))
        rows.append((name, *(f"{1 / each:.1f}" for each in times)))
    return table(*rows)


def by_replicas() -> str:
    head = ("", "seconds", *(f"{load:g} a second" for load in LOADS))
    rows: list[tuple] = [head]
    for name, (first, rate, _, _) in MEASURED.items():
        seconds = first + (TOKENS - 1) / rate
        needed = (f"{replicas(load, seconds):,}" for load in LOADS)
        rows.append((name, f"{seconds:.2f}", *needed))
    return table(*rows)


def a_million() -> str:
    rows: list[tuple] = [("", "machine hours", "at, an hour", "in all", "measured in")]
    for name, (first, rate, place, price) in MEASURED.items():
        hours = PICTURES * (first + (TOKENS - 1) / rate) / 3600
        rows.append((name, f"{hours:,.0f}", f"{price:.2f}", f"{price * hours:,.0f}", place))
    return table(*rows)


def page() -> str:
    """Everything, as the page has it."""
    parts = (
        f"What a token reads, in 16 bits, after {PROMPT} positions; and what is summed over the\n"
        "processes, in float32, twice in each layer: one sum of a token, all of a token, all of the\n"
        "prompt:",
        bytes_per_token(),
        "What the sums take, over two processes:",
        what_sums_take(),
        "Tokens per second of a 7B in several processes, to those of one as measured; below 1 it no\n"
        "longer pays:",
        where_it_pays(),
        "Tokens per second on a server of two sockets, in 16 bits, as an estimate: one process on one\n"
        "socket, on both without binding, and one bound to each, where a sum takes so long:",
        by_sockets(),
        f"Replicas of a 7B of which at most {PATIENCE:.0%} of the requests wait, one answer of "
        f"{TOKENS} tokens\nat a time each (M/M/c):",
        by_replicas(),
        f"{PICTURES:,} pictures with an answer of {TOKENS} tokens, one at a time:",
        a_million(),
    )
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
