"""Where a model is computed and with how many bits: the device and the dtype of `auto`, and
how much memory there is."""

from pathlib import Path

import torch

from minillava.fast.processor import has_fast_bfloat16
from minillava.options import DEVICES, DTYPES, expect_one_of

# Parameters from which `auto` is bfloat16 also on a CPU that emulates it: with this size it decodes
# as fast as float32, takes half the memory, and needs no copy first.
LARGE = 10**9


def choose_device(name: str) -> str:
    """`auto` is a GPU if there is one. Raises ValueError for an unknown device or one this machine
    lacks."""
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    kind, colon, index = name.partition(":")
    if kind not in available or (colon and not (index.isascii() and index.isdecimal())):
        expect_one_of("device", name, DEVICES)
    if not available[kind]:
        found = f"device {name!r} is not available to this PyTorch ({torch.__version__})"
        raise ValueError(f"{found}; use device cpu (a command: --device cpu)")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    # there is only one CPU device, whatever its index
    if kind != "cpu" and int(index or 0) >= count:
        there = kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise ValueError(f"device {name!r} is not in this machine, expected {there}")
    return name


def choose_dtype(name: str, device: str, stored: torch.dtype, parameters: int) -> torch.dtype:
    """`auto`: what is stored on a GPU; on a CPU bfloat16 if it has instructions for it or the model
    is LARGE; else float32."""
    if name == "auto":
        if not device.startswith("cpu"):
            return stored
        return torch.bfloat16 if has_fast_bfloat16() or parameters >= LARGE else torch.float32
    expect_one_of("dtype", name, ("auto", *DTYPES))
    return getattr(torch, name)  # a name of DTYPES


def available_memory(device: str) -> int | None:
    """Bytes of memory that are available on a device; None if the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
