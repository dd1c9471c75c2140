"""Damaged files of every kind: each gets the right answer or one clear error, never a traceback, a
hang, a crash of the interpreter, or more memory than twice what the file needs.

By default a seeded sample runs, with MINILLAVA_FUZZ=full all. The cases run in another process
(this file as a program), which is started again after a case that it did not survive. To repeat one
by hand:

    PYTHONPATH=tests/support python tests/fuzz/test_fuzz.py safetensors 12
"""

import base64
import contextlib
import faulthandler
import io
import itertools
import json
import os
import pickle
import queue
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from paths import REFERENCE, ROOT
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save, save_file

import minillava
from minillava.batch.journal import Journal, read_journal
from minillava.batch.questions import Question, read_questions
from minillava.files.pictures import LONGEST_NAME, open_image
from minillava.image import ImageProcessor

pytestmark = pytest.mark.fuzz

VICTIM = REFERENCE / "tied"  # the smallest of the stored checkpoints
PICTURE = REFERENCE / "pictures" / "tiny.png"
SINGLE, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
SIDE = 56
FULL = os.environ.get("MINILLAVA_FUZZ") == "full"
SAMPLE = 2  # cases of each category by default
SECONDS = 600  # a case takes some hundredths of one; a machine may stand still
SLACK = 64 << 20  # what a first time costs besides: decoders' tables, the allocator's arenas
# beyond what the process has when it starts; a belt, should a case ask for everything
ADDRESS_SPACE = 4 << 30


class Case(NamedTuple):
    """One corruption.

    damage: spoils a folder, or makes what is to be opened as a picture in it. names: what an error
    must name. must: "error" or "load", where one of the two would be wrong; "same" means the
    undamaged pixels or an error, "turned" the undamaged ones, upright or as they are stored, or an
    error.
    """

    category: str
    name: str
    damage: Callable[[Path], object]
    names: str = ""
    must: str = ""


# --- damages --------------------------------------------------------------------------------------


def write(path: Path, content: bytes | str) -> None:
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )


def truncations(
    category: str, path: str, content: bytes, lengths, must: str = "error"
) -> Iterator[Case]:
    for length in sorted({n for n in lengths if 0 <= n < len(content)}):
        yield Case(
            category,
            f"{path} cut to {length} bytes",
            lambda to, n=length: write(to / path, content[:n]),
            path,
            must,
        )


def flips(
    category: str, path: str, content: bytes, count: int, low: int, high: int, must: str = ""
) -> Iterator[Case]:
    """Single bytes changed at random places from `low` to `high`: one bit, or all of it."""
    dice = random.Random(f"{category} {path} {low} {high}")
    for _ in range(count):
        place, mask = dice.randrange(low, high), dice.choice([1 << dice.randrange(8), 0xFF])

        def damage(to: Path, place=place, mask=mask) -> Path:
            write(
                to / path, content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]
            )
            return to / path

        yield Case(category, f"{path} byte {place} ^ {mask:#04x}", damage, "", must)


def in_its_place(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return damage


NO_FILES = {
    "a directory": in_its_place(lambda path: path.mkdir()),
    "a link to itself": in_its_place(lambda path: path.symlink_to(path.name)),
    "a link to nowhere": in_its_place(lambda path: path.symlink_to("nowhere")),
    "a link to its folder": in_its_place(lambda path: path.symlink_to(".")),
    "a pipe that nobody writes to": in_its_place(lambda path: os.mkfifo(path)),
    "a link to /dev/null": in_its_place(lambda path: path.symlink_to("/dev/null")),
}
if os.name == "posix" and os.geteuid():  # root may read everything
    NO_FILES["unreadable"] = lambda path: (write(path, path.read_bytes()), path.chmod(0))

NO_CONTENT = {
    "nothing": b"",
    "one zero": b"\0",
    "zeros": bytes(4096),
    "random bytes": random.Random(0).randbytes(4096),
    "text": b"hello\n" * 50,
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 724584\n",
    "a web page": b"<!doctype html><html><head><title>404</title></head></html>",
    "a zip": b"PK\x03\x04" + bytes(200),
    "an empty zip": b"PK\x05\x06" + bytes(18),
}


def no_files(category: str, path: str) -> Iterator[Case]:
    for name, damage in NO_FILES.items():
        # Optional files, too: a link to nowhere is what an interrupted download leaves in the hub
        # cache.
        yield Case(category, f"{path} is {name}", lambda to, d=damage: d(to / path), "", "error")


def no_content(category: str, path: str, must: str = "error") -> Iterator[Case]:
    for name, content in NO_CONTENT.items():
        yield Case(
            category, f"{path} holds {name}", lambda to, c=content: write(to / path, c), path, must
        )


# --- safetensors ----------------------------------------------------------------------------------


def safetensors_cases() -> Iterator[Case]:
    content = (VICTIM / SINGLE).read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    ends = sorted(start + entry["data_offsets"][1] for entry in header.values())
    lengths = {*range(20), *range(0, start, start // 40), *range(start - 3, start + 4)}
    lengths |= {n + d for n in ends[:: len(ends) // 20] for d in (-1, 0, 1)} | {len(content) - 1}
    yield from truncations("safetensors cut", SINGLE, content, lengths)
    yield from flips("safetensors header flipped", SINGLE, content, 120, 0, start)
    yield from flips("safetensors data flipped", SINGLE, content, 40, start, len(content), "load")
    yield from no_files("safetensors no file", SINGLE)
    yield from no_content("safetensors no content", SINGLE)
    category = "safetensors header edited"

    def raw(
        name: str, length: int, head: bytes, rest: bytes = content[start:], must: str = "error"
    ) -> Case:
        whole = struct.pack("<Q", length) + head + rest
        return Case(
            category, name, lambda to: write(to / SINGLE, whole), SINGLE if must else "", must
        )

    def edited(name: str, new: dict, must: str = "error", **options) -> Case:
        head = json.dumps(new, **options).encode("utf-8", "surrogatepass")
        case = raw(name, len(head), head, must=must)
        # what is well-formed may be reported as a model that does not fit
        return case._replace(names="")

    head = content[8:start]
    for length in (
        0,
        1,
        2,
        start - 9,
        start - 7,
        10**6,
        10**8 + 1,
        2**31,
        2**32,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
    ):
        yield raw(f"header length {length}", length, head)
    for name, text in {
        "header in UTF-16": head.decode().encode("utf-16"), "header after a BOM": b"\xef\xbb\xbf" + head,
        "header not UTF-8": head[:-10] + b"\xff" * 10, "header twice": head + head, "header null": b"null",
        "header a list": b"[]", "header empty": b"{}", "header of braces": b"{" * 5000, "no header": b"",
        "header nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "header of zeros": bytes(5000),
    }.items():  # fmt: skip
        yield raw(name, len(text), text)
    yield raw("100 bytes more at the end", start - 8, head, content[start:] + bytes(100))
    yield raw("100 bytes more before the data", start - 8, head, bytes(100) + content[start:])
    first, other, *_ = sorted(header)
    size = header[first]["data_offsets"]
    wrong: dict[str, list] = {
        "dtype": ["F16", "F64", "I8", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", "float32", "", None, 1, [], {}],
        "shape": [[], [0], [-1], [1], [2**31, 2**31], [2**63], [2**64], [1.5], ["4"], None, "4", 4, [[4]], {}, [10**30],
                  [*header[first]["shape"][::-1], 1], [1, *header[first]["shape"]]],
        "data_offsets": [size[::-1], [0, 0], [0, 2**63], [2**63, 2**64], [-1, 3], [0], [], [0, 4, 8], None, "0", 0, {},
                         [0.0, 4.0], [size[0] + 4, size[1] + 4], [size[0], size[1] + 4], [size[0], size[1] - 4],
                         header[other]["data_offsets"]],
    }  # fmt: skip
    for field, values in wrong.items():
        for value in values:
            yield edited(
                f"{first} {field} {value}", {**header, first: {**header[first], field: value}}
            )
        less = {key: value for key, value in header[first].items() if key != field}
        yield edited(f"{first} without {field}", {**header, first: less})
    for entry in (None, [], "x", 1, {}):
        yield edited(f"{first} is {entry}", {**header, first: entry})
    yield edited("a field more", {**header, first: {**header[first], "extra": 1}}, must="")
    for value in (None, [], "x", 1, {"a": 1}, {"a": {}}, {"format": "tf"}):
        yield edited(f"__metadata__ is {value}", {**header, "__metadata__": value}, must="")
    names = [
        "",
        "x" * 10_000,
        "a\nb",
        "\x1b[2J",
        "\0",
        "\udc80",
        "../../x",
        "language_model." * 50,
        "é" * 300,
    ]
    for name in names:
        renamed = {name if key == first else key: value for key, value in header.items()}
        yield edited(f"{first} called {name[:20]!r}", renamed)
    same = json.dumps(header).encode()
    twice = same[:-1] + b"," + json.dumps({first: header[other]}).encode()[1:]
    yield raw("a name twice", len(twice), twice)
    swapped = {**header, first: header[other], other: header[first]}
    yield edited(f"{first} and {other} swapped", swapped, must="")
    several = {
        f"extra.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)
    }
    yield edited("20000 empty tensors more", {**header, **several})


# --- index files ----------------------------------------------------------------------------------


def make_shards(folder: Path) -> None:
    """The victim in two shards."""
    tensors = load_file(VICTIM / SINGLE)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (folder / SINGLE).unlink()
    for file, some in halves.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    write(
        folder / INDEX,
        json.dumps(
            {"metadata": {}, "weight_map": {n: f for f, some in halves.items() for n in some}}
        ),
    )


def index_cases(folder: Path) -> Iterator[Case]:
    content = (folder / INDEX).read_bytes()
    placed = json.loads(content)["weight_map"]
    first = min(placed)
    category = "index edited"

    def edited(name: str, index, must: str = "error", names: str = INDEX) -> Case:
        text = json.dumps(index)
        return Case(category, f"{INDEX}: {name}", lambda to: write(to / INDEX, text), names, must)

    files = [
        "../a.safetensors", "/etc/passwd", "/", ".", "..", "", "./a.safetensors", "b/../a.safetensors", "~/a",
        "nowhere", "c" * 300,
        "a\0b", "a\nb", "a.safetensors ", "A.SAFETENSORS", "b.safetensors", "config.json", INDEX, "tokenizer.model",
        "\udc80", "\x1b[2J",
        "a\\b", "C:a", "directory", "pipe", "loop", "cycle", "zero", None, 1, -1, 1.5, True, [], {}, ["a.safetensors"],
        {"a": "b"},
    ]  # fmt: skip
    for file, whole in itertools.product(files, (False, True)):
        new = dict.fromkeys(placed, file) if whole else {**placed, first: file}

        def damage(to: Path, new=new) -> None:
            (to / "directory").mkdir()
            os.mkfifo(to / "pipe")
            (to / "loop").symlink_to("loop")
            (to / "cycle").symlink_to(INDEX)
            (to / "zero").touch()
            write(to / INDEX, json.dumps({"weight_map": new}))

        yield Case(
            category, f"{INDEX} places {'all' if whole else first} in {file!r}", damage, "", "error"
        )
    for weight_map in (None, [], "x", 1, True, {}, [placed], {first: placed}):
        yield edited(f"weight_map is {str(weight_map)[:40]}", {"weight_map": weight_map})
    for index in (None, [], "x", 1, {}, placed, [{"weight_map": placed}]):
        yield edited(f"is {str(index)[:40]}", index)
    for metadata in (None, [], "x", -1, {"total_size": "x"}, {"total_size": 10**30}):
        yield edited(
            f"metadata is {metadata}", {"metadata": metadata, "weight_map": placed}, must="load"
        )
    for name in ("", "x" * 10_000, "a\nb", "\x1b[2J", "\0", "\udc80"):
        yield edited(
            f"one name more: {name[:20]!r}", {"weight_map": {**placed, name: "a.safetensors"}}
        )
    less = {name: file for name, file in placed.items() if name != first}
    yield edited(f"without {first}", {"weight_map": less}, names="")
    step = len(content) // 20
    yield from truncations(
        "index cut", INDEX, content, {0, 1, 2, *range(0, len(content), step), len(content) - 1}
    )
    yield from flips("index flipped", INDEX, content, 60, 0, len(content))
    yield from no_files("index no file", INDEX)
    yield from no_content("index no content", INDEX)
    for shard in ("a.safetensors", "b.safetensors"):
        yield from no_files("index shard no file", shard)
        yield from no_content("index shard no content", shard)

    def swap(to: Path) -> None:
        (to / "a.safetensors").rename(to / "c")
        (to / "b.safetensors").rename(to / "a.safetensors")
        (to / "c").rename(to / "b.safetensors")

    whole = (VICTIM / SINGLE).read_bytes()
    for name, content in {"the same": whole, "cut": whole[:-1], **NO_CONTENT}.items():
        must = "load" if name == "the same" else "error"
        yield Case(
            "index two sets",
            f"{SINGLE}: {name}",
            lambda to, c=content: write(to / SINGLE, c),
            SINGLE,
            must,
        )
        yield Case(
            "index two sets", f"{BIN}: {name}", lambda to, c=content: write(to / BIN, c), "", "load"
        )
    yield Case(
        "index two sets",
        "a shard of an earlier save",
        lambda to: write(to / "model-1.safetensors", whole),
        "",
        "load",
    )
    yield Case(
        "index two sets",
        "a bin index of nothing",
        lambda to: write(to / f"{BIN}.index.json", "{}"),
        "",
        "load",
    )
    yield Case(category, "shards swapped", swap, "", "error")


# --- JSON files -----------------------------------------------------------------------------------

VALUES = [
    "null", "[]", "{}", '""', '"x"', '"64"', "true", "false", "-1", "0", "1", "0.5", "3", "1e-30", "2147483648",
    "9223372036854775808",
    "1" + "0" * 30, "1" + "0" * 400, "1" * 5000, "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "[1]", "[null]",
    "[[]]",
    '{"a": 1}', '"' + "long" * 2500 + '"', '"a\\nb\\u001b[2J"', '"\\ud800"', "[" * 200 + "]" * 200,
    "[" * 100_000 + "]" * 100_000,
]  # fmt: skip


def paths_of(value, prefix: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*prefix, key)
            yield from paths_of(inner, (*prefix, key))


def replaced(content: dict, path: tuple, text: str) -> str:
    """The JSON of an object where the value at `path` is spelled `text`, which may be no JSON at
    all."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "PLACE"
    return json.dumps(copy).replace('"PLACE"', text)


MORE_FIELDS = {  # which the victim's files leave to their defaults
    "config.json": {
        "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default", "image_token_id": 440,
        "eos_token_id": 2,
        "multimodal_projector_bias": True, "quantization_config": None, "rope_scaling": None,
        "text_config": {"num_key_value_heads": 4, "head_dim": 16, "rope_theta": 10000.0, "hidden_act": "silu",
        "rope_scaling": None,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "factor": 1.0},
                        "attention_bias": False},
        "vision_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
    },
}  # fmt: skip


def merged(base: dict, more: dict) -> dict:
    both = {**more, **base}
    return both | {
        key: merged(base[key], value)
        for key, value in more.items()
        if isinstance(value, dict) and key in base
    }


def json_cases() -> Iterator[Case]:
    dice = random.Random("json")
    for file, share in (
        ("config.json", 0.25),
        ("generation_config.json", 0.25),
        ("preprocessor_config.json", 0.25),
        ("tokenizer_config.json", 0.02),
    ):
        many = 30 if file == "config.json" else 8
        yield from json_file_cases(file, (VICTIM / file).read_bytes(), share, many, dice)


def json_file_cases(
    file: str, raw: bytes, share: float, many: int, dice: random.Random
) -> Iterator[Case]:
    content = merged(json.loads(raw), MORE_FIELDS.get(file, {}))
    stem = file.removesuffix(".json")
    for path in paths_of(content):
        for text in VALUES:
            if dice.random() < share or path[-1] == "legacy":
                name = (
                    f"{file} {'.'.join(path)} = "
                    f"{text if len(text) < 40 else text[:10] + f'... ({len(text)})'}"
                )
                new = replaced(content, path, text)
                yield Case(f"{stem} field", name, lambda to, f=file, t=new: write(to / f, t))
    yield from truncations(
        f"{stem} cut", file, raw.rstrip(), range(0, len(raw.rstrip()), max(1, len(raw) // many))
    )
    yield from flips(f"{stem} flipped", file, raw, 2 * many, 0, len(raw))
    yield from no_files(f"{stem} no file", file)
    yield from no_content(f"{stem} no content", file)
    for name, text in {
        "a BOM before it": b"\xef\xbb\xbf" + raw, "in UTF-16": raw.decode().encode("utf-16"), "null": b"null",
        "a list": b"[]",
        "text": b'"x"', "a number": b"1", "twice": raw + raw, "a long number": b"1" * 5000,
        "nested lists": b"[" * 100_000,
        "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not UTF-8": b'{"a": "\xff"}',
    }.items():  # fmt: skip
        yield Case(
            f"{stem} no content",
            f"{file}: {name}",
            lambda to, f=file, t=text: write(to / f, t),
            file,
            "error",
        )


# --- files that name added tokens -----------------------------------------------------------------

_FLAGS = {
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": False,
}
TOKEN_FILES = {  # what one run writes beside a tokenizer.model, in all four places
    "added_tokens.json": {"<box>": 442, "[SEG]": 443},
    "special_tokens_map.json": {
        "additional_special_tokens": ["[SEG]"], "eos_token": {"content": "</s>", **_FLAGS}, "pad_token": "<pad>",
    },
    "tokenizer.json": {
        "added_tokens": [{"id": 442, "content": "<box>", **_FLAGS}],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"},
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            "2": {"content": "</s>", **_FLAGS, "special": True}, "442": {"content": "<box>", **_FLAGS},
        },
        "extra_special_tokens": {"image_token": "<image>"}, "legacy": False, "unk_token": "<unk>",
    },
}  # fmt: skip


def token_cases() -> Iterator[Case]:
    dice = random.Random("tokens")
    for file, content in TOKEN_FILES.items():
        yield from json_file_cases(file, json.dumps(content, indent=1).encode(), 0.5, 20, dice)
    texts = (
        "<box>",
        "<a>",
        "</s>",
        "<image>",
        "<pad>",
        "▁a",
        "a",
        "",
        " ",
        "\ud800",
        "x" * 5000,
        "\n",
    )
    ids = (442, 443, 444, 447, 448, 0, 2, 400, 440, -1, 2**31, 10**400, 1.5, "442", None, True)
    for text, i in itertools.product(texts, ids):
        for file, key in (("added_tokens.json", None), ("tokenizer.json", "added_tokens")):
            entry = {"id": i, "content": text, **_FLAGS, "rstrip": bool(len(text) % 2)}
            new = {text: i} if key is None else {key: [entry]}
            name = f"{file} {text[:9]!r} = {str(i)[:20]}"
            yield Case("tokens ids", name, lambda to, f=file, n=new: write(to / f, json.dumps(n)))


# --- tokenizer.model ------------------------------------------------------------------------------


def tokenizer_cases() -> Iterator[Case]:
    file, content = "tokenizer.model", (VICTIM / "tokenizer.model").read_bytes()
    lengths = {*range(40), *range(0, len(content), 201), *range(len(content) - 40, len(content))}
    yield from truncations("tokenizer cut", file, content, lengths)
    yield from flips("tokenizer flipped", file, content, 80, 0, len(content))
    yield from flips("tokenizer end flipped", file, content, 50, len(content) - 200, len(content))
    yield from no_files("tokenizer no file", file)
    yield from no_content("tokenizer no content", file)
    dice = random.Random("tokenizer")
    for i in range(30):
        low = dice.randrange(len(content))
        high = min(len(content), low + dice.choice([1, 2, 15, 300]))
        changed = dice.choice(
            [content[:low] + content[high:], content[:high] + content[low:high] + content[high:]]
        )
        yield Case(
            "tokenizer spliced", f"{file} splice {i}", lambda to, c=changed: write(to / file, c)
        )


# --- .bin files -----------------------------------------------------------------------------------


class Program:
    """What pickle turns into a call when it is opened."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def bin_cases() -> Iterator[Case]:
    tensors = load_file(VICTIM / SINGLE)
    first = min(tensors)
    forms = {"zip": saved(tensors), "legacy": saved(tensors, _use_new_zipfile_serialization=False)}

    def made(category: str, name: str, content: bytes, must: str = "", names: str = "") -> Case:
        return Case(category, f"{BIN}: {name}", lambda to: write(to / BIN, content), names, must)

    for form, content in forms.items():
        yield made("bin undamaged", form, content, "load")
        size, dice = len(content), random.Random(form)
        lengths = {
            *range(8),
            *dice.sample(range(size), 30),
            *range(size - 3, size),
            *dice.sample(range(4000), 10),
        }
        for n in sorted(lengths):
            yield made(f"bin {form} cut", f"{form} cut to {n} bytes", content[:n], "error", BIN)
        for part, low, high, count in (
            ("start", 0, 12_000, 50),
            ("end", size - 8000, size, 40),
            ("all", 0, size, 10),
        ):
            for case in flips(f"bin {form} flipped", BIN, content, count, low, high):
                yield case._replace(name=f"{case.name} ({form}, {part})")
    yield from no_files("bin no file", BIN)
    yield from no_content("bin no content", BIN)

    attacks = {
        "mkdir": os.mkdir,
        "eval": eval,
        "exec": exec,
        "open": open,
        "mknod": os.mknod,
        "link": os.symlink,
    }
    for (name, function), form in itertools.product(attacks.items(), forms):

        def attack(to: Path, name=name, function=function, form=form) -> None:
            ran = str(to / "ran")  # Bench.run looks whether this is there
            code = f"__import__('os').mkdir({ran!r})"
            arguments = {
                "eval": (code,),
                "exec": (code,),
                "open": (ran, "w"),
                "link": ("nowhere", ran),
            }.get(name, (ran,))
            evil = {**tensors, first: Program(function, *arguments)}
            write(to / BIN, saved(evil, _use_new_zipfile_serialization=form == "zip"))

        yield Case("bin runs code", f"{BIN}: {form} calls {name}", attack, BIN, "error")

    yield made(
        "bin other content",
        "a checkpoint inside",
        saved({"state_dict": tensors, "epoch": 3}),
        "load",
        "",
    )
    for name, content in {
        "a list": [1, 2], "a number": 3, "nothing": None, "a tensor": tensors[first], "an empty dict": {},
        "numbers": {"a": 1},
        "a checkpoint inside another": {"state_dict": {"model": tensors}}, "two inside": {"state_dict": tensors,
        "model": {first: tensors[first]}}, "numbered tensors": dict(enumerate(tensors.values())),
        "a sparse tensor": {**tensors, first: tensors[first].to_sparse()},
        "a meta tensor": {**tensors, first: tensors[first].to("meta")},
        "complex": {**tensors, first: tensors[first].to(torch.complex64)},
        "int8": {**tensors, first: tensors[first].to(torch.int8)},
        "expanded": {**tensors, first: torch.zeros(1).expand(2**40)}, "no elements": {**tensors, first: torch.zeros(0)},
        "a name with an escape": {**tensors, "\x1b[2J\n": torch.zeros(1)}, "another tensor": {**tensors,
        "x": torch.zeros(1)},
        "a nested name": {**tensors, ("a", "b"): torch.zeros(1)}, "a string": {**tensors, first: "x" * 10_000},
    }.items():  # fmt: skip
        yield made(
            "bin other content", name, saved(content), "error", BIN if name != "nothing" else ""
        )._replace(names="")
    strided = {**tensors, first: torch.nn.Parameter(tensors[first].clone().T.contiguous().T)}
    yield made("bin other content", "a strided Parameter", saved(strided), "load")
    inside = zipfile.ZipFile(io.BytesIO(forms["zip"]))
    files = {name: inside.read(name) for name in inside.namelist()}
    data = next(name for name in files if name.endswith("/data.pkl"))
    root = data.split("/")[0]
    for name, content in {
        "a zip of text": zipped({"readme.txt": b"hello"}),
        "a zip that leads out": zipped({"../../x": b"hello", **files}),
        "compressed": zipped(files, zipfile.ZIP_DEFLATED),
        "no data.pkl": zipped({n: c for n, c in files.items() if n != data}),
        "no tensors": zipped({data: files[data]}), "two data.pkl": zipped({**files, "other/data.pkl": b""}),
        "an empty tensor": zipped({**files, f"{root}/data/0": b""}),
        "a short tensor": zipped({**files, f"{root}/data/0": bytes(8)}),
        "data.pkl of nothing": zipped({**files, data: b""}),
        "data.pkl of a list": zipped({**files, data: pickle.dumps([1], 2)}),
        "data.pkl nested": zipped({**files, data: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."}),
        "data.pkl of marks": zipped({**files, data: b"\x80\x02" + b"(" * 500_000 + b"."}),
        "data.pkl of a long text": zipped({**files, data: b"\x80\x02X" + struct.pack("<I", 2**31) + b"abc."}),
        "data.pkl of a long number": zipped({**files, data: b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"abc."}),
        "the wrong byte order": zipped({**files, f"{root}/byteorder": b"middle"}),
        "a pickle": pickle.dumps({"a": 1}), "a bare pickle that nests": b"\x80\x02" + b"]" * 200_000 + b".",
        "numpy": b"\x93NUMPY" + bytes(200), "safetensors": (VICTIM / SINGLE).read_bytes(),
    }.items():  # fmt: skip
        must = "" if name in ("a zip that leads out", "compressed") else "error"
        yield made("bin other content", name, content, must)
    for entry in (data, f"{root}/data/0"):

        def pack(to: Path, entry=entry) -> None:
            write(to / BIN, zipped({**files, entry: bytes(150 << 20)}, zipfile.ZIP_DEFLATED))

        yield Case("bin bomb", f"{BIN}: 150 MiB of zeros in {entry}", pack, BIN, "error")


# --- pictures -------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """One picture of 40 x 30 in every way that people store them."""
    x, y = np.meshgrid(np.arange(40), np.arange(30))
    rgb = Image.fromarray(np.stack([x * 6, y * 8, (x * y) % 256], axis=-1).astype(np.uint8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    palette, deep = (
        rgb.convert("P", palette=Image.Palette.ADAPTIVE),
        Image.fromarray((x * 1600).astype(np.uint16)),
    )
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "append_images": [noise, rgb], "duration": 40}
    return {
        "rgb.png": encoded(rgb, "PNG"),
        "rgba.png": encoded(alpha, "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "deep.png": encoded(deep, "PNG"),
        "grey.png": encoded(rgb.convert("L"), "PNG", transparency=9),
        "bit.png": encoded(rgb.convert("1"), "PNG"),
        "animated.png": encoded(rgb, "PNG", **several),
        "rgb.jpg": encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": encoded(noise, "JPEG", progressive=True),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "lossy.webp": encoded(noise, "WEBP"),
        "lossless.webp": encoded(alpha, "WEBP", lossless=True),
        "animated.webp": encoded(rgb, "WEBP", **several),
        "still.gif": encoded(palette, "GIF"),
        "animated.gif": encoded(rgb, "GIF", **several),
        "rgb.bmp": encoded(rgb, "BMP"),
        "rgb.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "rgb.ppm": encoded(rgb, "PPM"),
    }


def described_pictures() -> dict[str, tuple[bytes, int, int]]:
    """The same picture with all that cameras write beside it, which says that it lies on its side;
    and from where to where that stands in the file."""
    x, y = np.meshgrid(np.arange(40), np.arange(30))
    image = Image.fromarray(np.stack([x * 6, y * 8, (x * y) % 256], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "A camera's maker", 6, 72.5
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngInfo()
    text.add_text("Author", "Somebody")
    text.add_text("Comment", "long " * 99, zip=True)
    text.add_itxt("Title", "ü" * 9, zip=True)
    jpg = encoded(image, "JPEG", exif=exif, icc_profile=profile, comment=b"Hello")
    png = encoded(image, "PNG", exif=exif, icc_profile=profile, pnginfo=text)
    webp = encoded(image, "WEBP", lossless=True, exif=exif)
    return {
        "described.jpg": (jpg, 2, jpg.index(b"\xff\xdb")),
        "described.png": (png, 33, png.index(b"IDAT") - 4),
        "described.webp": (webp, webp.index(b"EXIF"), len(webp)),
    }


def metadata_cases() -> Iterator[Case]:
    """Bytes of metadata changed, save those of the orientation itself."""
    dice = random.Random("metadata")
    for name, (content, low, high) in described_pictures().items():
        entry = re.search(rb"\x01\x12\x00\x03\x00{3}\x01|\x12\x01\x03\x00\x01\x00{3}", content)
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(dice.choice([1, 1, 2, 20])):
                damaged[dice.randrange(low, high)] ^= dice.choice([1 << dice.randrange(8), 0xFF])
            damaged[entry.start() : entry.end() + 4] = content[entry.start() : entry.end() + 4]
            text = (
                f"{name} {sum(a != b for a, b in zip(damaged, content, strict=True))} bytes of its "
                "metadata"
            )

            def make(to: Path, name=name, damaged=bytes(damaged)) -> Path:
                write(to / name, damaged)
                return to / name

            yield Case("picture metadata", text, make, name, "turned")


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    small = encoded(Image.new("L", (1, 1)), "PNG")
    chunk = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + small[33:]


def picture_cases() -> Iterator[Case]:
    def made(category: str, name: str, content: bytes, must: str = "") -> Case:
        def make(to: Path) -> Path:
            write(to / name.split()[0], content)
            return to / name.split()[0]

        return Case(category, name, make, name.split()[0], must)

    dice = random.Random("pictures")
    for name, content in pictures().items():
        kind = name.split(".")[1]
        yield made("picture undamaged", name, content, "load")
        lengths = {
            *dice.sample(range(min(len(content), 300)), 3),
            *dice.sample(range(len(content)), 4),
        }
        for n in sorted(
            {*lengths, len(content) - 1, len(content) - 2, len(content) - 9, len(content) - 13}
        ):
            yield made(f"{kind} cut", f"{name} cut to {n}", content[:n], "same")
        for high in (60, len(content)):
            for case in flips(f"{kind} flipped", name, content, 6, 0, high):
                yield case._replace(names=name)
        place = dice.randrange(len(content) - 20)
        yield made(
            f"{kind} flipped",
            f"{name} zeros at {place}",
            content[:place] + bytes(20) + content[place + 20 :],
        )
    for name, content in NO_CONTENT.items():
        yield made("picture no content", f"x.png of {name}", content, "error")
    for name, damage in NO_FILES.items():

        def make(to: Path, damage=damage) -> Path:
            write(to / "x.png", PICTURE.read_bytes())
            damage(to / "x.png")
            return to / "x.png"

        yield Case("picture no file", f"x.png is {name}", make, "x.png", "error")
    yield from metadata_cases()
    for width, height in ((1, 1), (1, 2), (3, 1), (10_000, 1), (1, 10_000), (2000, 2000), (13_400, 100), (60_000, 30),
                          (30, 60_000), (600, 20_000), (65_535, 1)):  # fmt: skip
        image = Image.new("RGB", (width, height), (200, 100, 50))
        yield made("picture sizes", f"{width}x{height}.png", encoded(image, "PNG"), "load")
    for width, height in ((0, 0), (0, 5), (60_000, 60_000), (13_000, 13_000), (2**31 - 1, 1), (1, 2**31 - 1),
                          (2**32 - 1, 2**32 - 1), (100_000, 100_000), (178_956_970, 1), (9000, 9000)):  # fmt: skip
        yield made(
            "picture sizes", f"claims-{width}x{height}.png", claiming(width, height), "error"
        )
    for name in (
        "no-such-picture.png",
        "no/such/folder.png",
        "x" * 300 + ".png",
        "",
        ".",
        "/",
        "a\0b",
        "a\nb.png",
        "\udc80.png",
    ):
        yield Case(
            "picture paths", f"path {name[:20]!r}", lambda to, n=name: n, repr(name)[1:-1], "error"
        )
    good = base64.b64encode(PICTURE.read_bytes()).decode()
    prefix = "data:image/png;base64,"
    for name, url in {
        "no comma": "data:image/png;base64", "nothing": "data:", "no base64": "data:image/png," + good, "empty": prefix,
        "not base64": prefix + "é",
        "odd length": prefix + good[:-4] + "A",
        "cut": prefix + good[:80], "twice": prefix + prefix + good,
        "text": prefix + base64.b64encode(b"hello").decode(), "percent": prefix + "%89PNG",
        "surrogate": prefix + "\udc80",
        "url alphabet": prefix + "-_-_", "percent cut": prefix + good[:40] + "%2" + good[40:],
        "no mime cut": "data:;base64," + good[:40],
        "a NUL": prefix + "\0", "a list": "data:image/png;base64,,,,", "only padding": prefix + "====",
    }.items():  # fmt: skip
        yield Case("data: URLs", f"data: URL, {name}", lambda to, u=url: u, "data: URL", "error")
    for mime in ("image/jpeg", "text/plain", "", "image/png;charset=utf-8"):
        yield Case(
            "data: URLs",
            f"data: URL of {mime!r}",
            lambda to, m=mime: f"data:{m};base64,{good}",
            must="load",
        )
    for name, payload in {
        "spaces": good[:40] + " " + good[40:], "line breaks": good[:40] + "\r\n" + good[40:] + "\n",
        "no padding": good.rstrip("="), "escapes": good.replace("+", "%2B").replace("=", "%3D"),
        "the alphabet of URLs": good.replace("+", "-").replace("/", "_"),
    }.items():  # fmt: skip
        yield Case(
            "data: URLs", f"data: URL, {name}", lambda to, u=prefix + payload: u, must="load"
        )
    for i in range(20):
        place = dice.randrange(len(good))
        broken = prefix + good[:place] + dice.choice("=%\n A/+") + good[place + 1 :]
        yield Case("data: URLs", f"data: URL broken {i}", lambda to, u=broken: u, "data: URL")

    def stdin(content: bytes) -> io.BytesIO:
        file = io.BytesIO(content)
        file.name = "stdin"  # as cli/opening.py names it
        return file

    for name, content in {
        "empty": b"",
        "text": b"hello",
        "cut": PICTURE.read_bytes()[:100],
    }.items():
        yield Case(
            "picture no content", f"stdin, {name}", lambda to, c=content: stdin(c), "stdin", "error"
        )
    for source in (None, 3, 1.5, {}, object, np.zeros((3, 3)), torch.zeros(3, 3)):
        yield Case(
            "picture no content", f"{source!r} for a picture", lambda to, s=source: s, must="error"
        )


# --- adapters -------------------------------------------------------------------------------------

LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA_FIELDS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": False,
    "init_lora_weights": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {}, "bias": "none", "use_dora": False,
    "modules_to_save": None, "base_model_name_or_path": "x", "layers_to_transform": None, "fan_in_fan_out": False,
}  # fmt: skip


def make_adapter(folder: Path) -> None:
    """A LoRA of the victim's queries, and one norm that it keeps whole."""
    folder.mkdir()
    tensors, numbers = load_file(VICTIM / SINGLE), torch.Generator().manual_seed(0)
    lora = {}
    for name in [
        n for n in tensors if n.startswith("language_model.") and n.endswith("q_proj.weight")
    ]:
        rows, columns = tensors[name].shape
        for half, shape in (("A", (2, columns)), ("B", (rows, 2))):
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"
            lora[key] = torch.randn(shape, generator=numbers) / 10
    lora["base_model.model.language_model.model.norm.weight"] = tensors[
        "language_model.model.norm.weight"
    ].clone()
    save_file(lora, folder / LORA)
    write(folder / LORA_CONFIG, json.dumps(LORA_FIELDS))


def adapter_cases(folder: Path) -> Iterator[Case]:
    raw, content = (folder / LORA_CONFIG).read_bytes(), (folder / LORA).read_bytes()
    tensors, dice = load_file(folder / LORA), random.Random("adapter")
    for path in paths_of(LORA_FIELDS):
        for text in VALUES:
            if dice.random() < 0.3 or path[-1] == "init_lora_weights":
                new = replaced(LORA_FIELDS, path, text)
                yield Case(
                    "adapter field",
                    f"{path} = {text[:40]}",
                    lambda to, t=new: write(to / LORA_CONFIG, t),
                )
    yield from truncations("adapter config cut", LORA_CONFIG, raw, range(0, len(raw), 20))
    yield from flips("adapter config flipped", LORA_CONFIG, raw, 40, 0, len(raw))
    for name in (LORA_CONFIG, LORA):
        yield from no_files("adapter no file", name)
        yield from no_content("adapter no content", name)
    start = 8 + struct.unpack("<Q", content[:8])[0]
    yield from truncations(
        "adapter cut", LORA, content, {0, 7, 8, start - 1, start, start + 9, len(content) - 1}
    )
    yield from flips("adapter header flipped", LORA, content, 60, 0, start)
    yield from flips("adapter data flipped", LORA, content, 20, start, len(content), "load")

    def edited(name: str, new: dict, must: str = "error") -> Case:
        return Case("adapter edited", name, lambda to: write(to / LORA, save(new)), "", must)

    first = min(tensors)
    for prefix in ("module.", "_orig_mod.", "_fsdp_wrapped_module."):
        wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
        yield edited(f"all behind {prefix}", wrapped, "load")
        yield edited(f"one behind {prefix}", {**tensors, prefix + first: tensors[first].clone()})
    for shape in ((0,), (1,), (0, 4), (2, 3), (4, 4, 4), (2**16, 1)):
        yield edited(f"{first} has shape {shape}", {**tensors, first: torch.zeros(shape)})
    for dtype in (torch.int8, torch.int64, torch.bool):
        yield edited(
            f"{first} is {dtype}",
            {**tensors, first: torch.zeros(tensors[first].shape, dtype=dtype)},
        )
    yield edited(f"no {first}", {name: tensor for name, tensor in tensors.items() if name != first})
    yield edited("nothing", {})
    for name in (
        "x",
        "base_model.model.x",
        first.replace("lora_A", "lora_C"),
        first.replace(".weight", ".bias"),
        first.replace("lora_A", "lora_magnitude_vector"),
        first.replace("lora_A", "lora_A.second"),
    ):
        yield edited(f"{name} more", {**tensors, name: torch.zeros(2)})
    grown = torch.zeros(500, tensors[first].shape[1])
    yield edited(
        "a larger table",
        {**tensors, "base_model.model.language_model.model.embed_tokens.weight": grown},
        "",
    )


# --- questions and journals of batch --------------------------------------------------------------

ASKED = [
    {
        "question_id": i if i % 2 else f"q{i}",
        "image": "a.png",
        "text": f"Où est l'étoile {i}?\nDis-le.",
        "label": "x",
    }
    for i in range(6)
]
JOURNAL = Journal(Path("a.partial"), {"questions": "0" * 64, "top_p": None})


def asked_record(question: Question, *found) -> dict:
    return question.record(*found, f"id{question.line}", "model")


def questions_of(raw: list[dict]) -> list[Question]:
    return read_questions(json.dumps(raw).encode(), "")


def journal_lines() -> list[bytes]:
    """A whole journal of five answers and an error, which is finished."""
    said = [(f"À gauche {i}.", None, {"finish_reason": "stop"}) for i in range(5)] + [
        (None, "no such picture", None)
    ]
    records = [
        asked_record(question, *found)
        for question, found in zip(questions_of(ASKED), said, strict=True)
    ]
    return [
        JOURNAL.header,
        *(json.dumps([i, one]).encode() + b"\n" for i, one in enumerate(records, start=1)),
    ]


def stored(category: str, file: str, name: str, content: bytes | str, must: str = "") -> Case:
    def damage(to: Path) -> Path:
        write(to / file, content)
        return to / file

    return Case(category, name, damage, "", must)


def batch_files(name: str, contents: dict[str, bytes]) -> Iterator[Case]:
    """Each content undamaged, cut, with a byte changed, with zeros, and other things in its
    place."""
    dice = random.Random(name)

    def made(category: str, what: str, content: bytes, must: str = "") -> Case:
        return stored(f"{name} {category}", name, f"{name}: {what}", content, must)

    for kind, content in contents.items():
        yield made("undamaged", kind, content, "load")
        for n in sorted(dice.sample(range(len(content)), 12)):
            yield made(
                "cut", f"{kind} cut to {n}", content[:n], "same" if name == "journal" else ""
            )
        yield from flips(f"{name} flipped", name, content, 40, 0, len(content))
        for n in dice.sample(range(len(content)), 6):
            zeros = content[:n] + bytes(min(512, len(content) - n)) + content[n + 512 :]
            yield made("zeros", f"{kind} zeros at {n}", zeros, "same" if name == "journal" else "")
    for kind, content in NO_CONTENT.items():
        yield made(
            "no content", kind, content, "" if kind == "nothing" or name == "journal" else "error"
        )


def question_cases() -> Iterator[Case]:
    lines = b"".join(json.dumps(question).encode() + b"\n" for question in ASKED)
    text = json.dumps(ASKED, ensure_ascii=False, indent=1)
    contents = {"lines": lines, "an array": text.encode(), "UTF-16": text.encode("utf-16"),
                "UTF-32": text.encode("utf-32"),
                "objects": text[1:-1].replace("},", "}").encode(), "one line": json.dumps(ASKED).encode()}  # fmt: skip
    yield from batch_files("questions", contents)
    for path in paths_of(ASKED[0]):
        for value in VALUES:
            first, *others = replaced(ASKED[0], path, value), *map(json.dumps, ASKED[1:])
            for form, content in (
                ("lines", "\n".join([first, *others])),
                ("array", f"[{','.join([first, *others])}]"),
            ):
                yield stored(
                    "questions replaced", "questions", f"{form}, {path[0]} is {value[:20]}", content
                )


def journal_cases() -> Iterator[Case]:
    lines = journal_lines()
    contents = {
        "whole": b"".join(lines),
        "anew": b"".join([lines[0], JOURNAL.ANEW, *lines[1:4]]),
        "begun": b"".join(lines[:3]),
    }
    yield from batch_files("journal", contents)
    for what, line in {"a number": b"7", "three": b"[1, {}, 2]", "a text": b'["1", {}]', "no record": b"[1, 7]",
                       "a fraction": b"[1.5, {}]", "another question's": lines[2].replace(b"[2,", b"[1,").strip(),
                       "of no question": lines[2].replace(b"[2,", b"[9,").strip(), "depth": b"[" * 100_000,
                       "truth": b"[true, {}]", "nothing said": b"[3, {}]"}.items():  # fmt: skip
        content = lines[0] + line + b"\n" + b"".join(lines[1:])
        yield stored("journal lines", "journal", f"journal: {what}", content, "same")


def read_batch_file(group: str, case: Case, path: Path) -> str | None:
    """What is wrong with what was read."""
    if group == "questions":
        found = read_questions(path.read_bytes(), "", str(path))
        for question in found:
            if question.error is None and not (
                isinstance(question.text, str) and question.question_id is not None
            ):
                return f"a question without a text or an id: {question}"
            if question.error is not None and (
                not question.error or "\n" in question.error or len(question.error) > 500
            ):
                return f"an error of several lines, or of none: {question.error!r:.600}"
        if case.must == "load" and [(q.question_id, q.text, q.images) for q in found] != [
            (q["question_id"], q["text"], ["a.png"]) for q in ASKED
        ]:
            return f"other questions: {found}"
        return None
    journal, known = Journal(path, {}), [json.loads(line) for line in journal_lines()[1:]]
    journal.header = JOURNAL.header
    found = read_journal(journal, questions_of(ASKED), asked_record)
    again = read_journal(journal, questions_of(ASKED), asked_record)
    if found != again:
        return f"read twice, it says {found}, then {again}"
    if case.must and not all([line, one] in known for line, one in found.items()):
        return f"other answers than were given: {found}"
    if (
        case.must == "load"
        and len(found) != {"whole": 6, "anew": 3, "begun": 2}[case.name.split(": ")[1]]
    ):
        return f"{len(found)} answers of an undamaged journal"
    return None


# --- the process that runs them -------------------------------------------------------------------

GROUPS = (
    "safetensors",
    "index",
    "json",
    "tokenizer",
    "tokens",
    "bin",
    "pictures",
    "adapters",
    "questions",
    "journals",
)
ALONE = ("pictures", "questions", "journals")  # which need no checkpoint


class Bench:
    """Victims and cases, made once."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.victims = dict.fromkeys(GROUPS, VICTIM)
        self.victims["index"] = Path(shutil.copytree(VICTIM, folder / "sharded"))
        make_shards(self.victims["index"])
        self.victims["tokens"] = Path(shutil.copytree(VICTIM, folder / "tokens"))
        for name, content in TOKEN_FILES.items():
            write(self.victims["tokens"] / name, json.dumps(content))
        self.victims["bin"] = Path(
            shutil.copytree(VICTIM, folder / "bin", ignore=shutil.ignore_patterns(SINGLE))
        )
        write(self.victims["bin"] / BIN, saved(load_file(VICTIM / SINGLE)))
        self.victims["adapters"] = folder / "adapter"
        make_adapter(self.victims["adapters"])
        self.processor = ImageProcessor(SIDE)
        self.undamaged = {name: self.processor(content) for name, content in pictures().items()}
        self.upright = {
            name: open_image(content) for name, (content, _, _) in described_pictures().items()
        }

    def cases(self, group: str) -> list[Case]:
        makers = {
            "safetensors": safetensors_cases,
            "index": lambda: index_cases(self.victims["index"]),
            "json": json_cases,
            "tokenizer": tokenizer_cases,
            "tokens": token_cases,
            "bin": bin_cases,
            "pictures": picture_cases,
            "adapters": lambda: adapter_cases(self.victims["adapters"]),
            "questions": question_cases,
            "journals": journal_cases,
        }
        return list(makers[group]())

    def run(self, group: str, case: Case) -> dict:
        """{"outcome": "loaded", "error" or "wrong", "what": ..., "mib": memory above what there
        was}"""
        self.count += 1
        folder, need = self.folder / str(self.count), 0
        if group in ALONE:
            folder.mkdir()
        else:
            shutil.copytree(self.victims[group], folder)
            need = sum(path.stat().st_size for path in folder.iterdir())
            need += (
                sum(path.stat().st_size for path in VICTIM.iterdir()) if group == "adapters" else 0
            )
        source = case.damage(folder)
        before = start_measuring()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            outcome, what = self.judge(group, case, folder, source)
        grown = memory("VmHWM") - before
        if (folder / "ran").exists():
            outcome, what = "wrong", f"ran the code in the file; {outcome}: {what}"
        if group == "pictures":
            need = claimed_bytes(source)
        if grown > 2 * need + SLACK:
            outcome, what = (
                "wrong",
                f"took {grown >> 20} MiB, needs {need >> 20}; {outcome}: {what}",
            )
        # Of two sets of weights one is read, which a person must know; of nothing else is there a
        # warning.
        noted = case.category.endswith("two sets")
        if (
            noted
            and outcome == "loaded"
            and not any("are read from" in str(w.message) for w in warned)
        ):
            outcome, what = "wrong", "read one of two sets of weights without a word"
        if warned and outcome != "wrong" and not noted:
            outcome, what = (
                "wrong",
                f"warns: {warned[0].category.__name__}: {warned[0].message}; {outcome}: {what}",
            )
        shutil.rmtree(folder)
        return {"outcome": outcome, "what": what, "mib": round(grown / 2**20, 1)}

    def judge(self, group: str, case: Case, folder: Path, source) -> tuple[str, str]:
        try:
            if group == "pictures":
                problem = self.look(case, source)
            elif group in ALONE:
                problem = read_batch_file(group, case, source)
            else:
                weights, lora = (VICTIM, folder) if group == "adapters" else (folder, None)
                assistant = minillava.load(weights, adapter=lora, device="cpu", dtype="float32")
                problem = None
        except (ValueError, OSError) as error:
            return complaint(error, case, str(folder) if group != "pictures" else "")
        except BaseException as error:
            return "wrong", f"{type(error).__name__}: {error}"
        if case.must == "error":
            return "wrong", "loaded as if it were whole"
        if group in ALONE:
            return ("wrong", problem) if problem else ("loaded", "")
        try:
            assistant.ask(PICTURE, "What is it?", max_new_tokens=2)
        except (ValueError, OSError) as error:
            if "\n" in str(error) or not str(error):
                return "wrong", f"loaded, then asked: {error}"
        except BaseException as error:
            return "wrong", f"loaded, then asked: {type(error).__name__}: {error}"
        return "loaded", ""

    def look(self, case: Case, source) -> str | None:
        """What is wrong with the pixels of a picture that opens."""
        image = open_image(source)
        if hasattr(source, "seek"):
            source.seek(0)
        pixels = self.processor(source)
        if (
            image.mode != "RGB"
            or pixels.shape != (1, 3, SIDE, SIDE)
            or pixels.dtype != torch.float32
        ):
            return f"mode {image.mode}, pixels {list(pixels.shape)} {pixels.dtype}"
        if not pixels.isfinite().all():
            return "pixels are not finite"
        if case.must == "same" and not torch.equal(pixels, self.undamaged[case.name.split()[0]]):
            return "opened, with other pixels than the whole picture"
        if case.must == "turned":
            upright = self.upright[case.names]
            if not any(
                np.array_equal(image, known)
                for known in (upright, upright.transpose(Image.Transpose.ROTATE_90))
            ):
                return "opened, neither upright nor as it is stored"
        if case.category == "picture undamaged":
            wanted = (30, 40) if case.name == "rgb.jpg" else (40, 30)  # lies on its side, EXIF says
            return None if image.size == wanted else f"size {image.size}, expected {wanted}"
        return None


def complaint(error: Exception, case: Case, folder: str) -> tuple[str, str]:
    """Whether an error is clear: one line that names the file (only lists of tensors are
    longer)."""
    first, *more = str(error).splitlines() or [""]
    shown = f"{type(error).__name__}: {error!s:.600}"
    if case.must == "load":
        return "wrong", f"refused: {shown}"
    head = case.names[: LONGEST_NAME // 4]  # a long name is shown by its two ends
    if folder not in first or head not in first or case.names[-20:] not in first:
        return "wrong", f"does not name {case.names or folder}: {shown}"
    if more and "do not fit" not in first:
        return "wrong", f"not one line: {shown}"
    if len(first) > 1500:
        return "wrong", f"{len(first)} characters: {shown}"
    return "error", shown


def claimed_bytes(source) -> int:
    """What the picture that a header claims takes at four bytes a pixel; its margin takes
    nothing."""
    if not isinstance(source, Path) or not source.is_file():
        return 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source) as image:
                width, height = image.size
    except Exception:
        return 0
    return 4 * width * height if width * height < 180e6 else 0


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none, and memory goes unmeasured."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def start_measuring() -> int:
    """Set the highest memory so far to what it is now, which is returned."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return memory("VmHWM")  # not this kernel: only a case above all before it is seen
    return memory("VmRSS")


def serve() -> None:
    """Answer lines "GROUP NUMBER" on stdin with a line of JSON on stdout, until stdin ends."""
    faulthandler.enable()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    with tempfile.TemporaryDirectory() as folder:
        bench, known = Bench(Path(folder)), {}
        warm = minillava.load(VICTIM, device="cpu", dtype="float32")
        # what a first time costs is not the cases'
        warm.ask(PICTURE, "What is it?", max_new_tokens=2)
        if size := memory("VmSize"):
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE,) * 2)
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            group, number = line.split()
            if group not in known:
                known[group] = bench.cases(group)
            answers.write(json.dumps(bench.run(group, known[group][int(number)])) + "\n")
            answers.flush()


class Runner:
    """Runs cases in another process, which is started when there is none."""

    def __init__(self, folder: Path):
        self.folder, self.process, self.lines, self.listener = folder, None, None, None

    def run(self, group: str, number: int) -> dict:
        if self.process is None:
            self._start()
        started = time.perf_counter()
        try:
            self.process.stdin.write(f"{group} {number}\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=SECONDS)
        except (OSError, queue.Empty):
            line = None
        if line:
            return json.loads(line)
        hung = time.perf_counter() - started >= SECONDS
        what = f"no answer in {SECONDS} seconds" if hung else self._last_words()
        self.stop()
        return {"outcome": "wrong", "what": what, "mib": 0.0}

    def _start(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support"))),
        }
        with open(self.folder / "stderr", "w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                text=True, env=environment,
            )  # fmt: skip
        self.lines = queue.Queue()
        self.listener = threading.Thread(
            target=self._listen, args=(self.process.stdout, self.lines), daemon=True
        )
        self.listener.start()
        if self.lines.get() is None:  # no case has run yet: what is wrong is not what it damages
            words = self._last_words()
            self.stop()
            raise RuntimeError(words)

    @staticmethod
    def _listen(stdout, lines: queue.Queue) -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)  # it has ended

    def _last_words(self) -> str:
        status = self.process.wait(timeout=SECONDS)
        said = (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")[-1500:]
        return f"the interpreter ended with {status}: {said}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.listener.join()
            self.process.stdout.close()
            with contextlib.suppress(OSError):  # a request that it did not live to read
                self.process.stdin.close()
            self.process = None


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("runner"))
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def table(request):
    """Rows of (category, Counter of outcomes), shown when all groups have run."""
    rows: list[tuple[str, Counter]] = []
    yield rows
    total = Counter()
    for _, counts in rows:
        total.update(counts)
    lines = [f"{'damaged':<32}{'cases':>7}{'loaded':>8}{'error':>7}{'wrong':>7}"]
    for category, counts in [*rows, ("all" if FULL else "all; more: MINILLAVA_FUZZ=full", total)]:
        numbers = "".join(
            f"{counts[key]:>{width}}" for key, width in (("loaded", 8), ("error", 7), ("wrong", 7))
        )
        lines.append(f"{category:<32}{sum(counts.values()):>7}{numbers}")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


def chosen(cases: list[Case]) -> list[int]:
    """The numbers of the cases to run: all, or some of each category, always the same."""
    categories: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        categories.setdefault(case.category, []).append(number)
    dice = random.Random(0)
    return [
        i
        for same in categories.values()
        for i in (same if FULL else dice.sample(same, min(SAMPLE, len(same))))
    ]


def test_there_are_more_than_a_thousand_cases(bench):
    """A mistake in how cases are collected would empty the fuzz test, and it would pass."""
    assert sum(len(bench.cases(group)) for group in GROUPS) > 1000


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")
@pytest.mark.parametrize("group", GROUPS)
def test_damage_gets_the_right_answer_or_one_clear_error(group, runner, bench, table):
    """Damaged files and odd inputs would end in a traceback, a hang or a wrong answer without an
    error."""
    cases = bench.cases(group)
    wrong, counts = [], {}
    for number in chosen(cases):
        found = runner.run(group, number)
        counts.setdefault(cases[number].category, Counter())[found["outcome"]] += 1
        if found["outcome"] == "wrong":
            wrong.append(
                f"{cases[number].name}\n  {found['what']}\n  "
                f"PYTHONPATH=tests/support python tests/fuzz/test_fuzz.py {group} {number}"
            )
    table += counts.items()
    assert not wrong, f"{len(wrong)} of {sum(c.total() for c in counts.values())}:\n" + "\n".join(
        wrong
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            by_hand = Bench(Path(temporary))
            one = by_hand.cases(sys.argv[1])[int(sys.argv[2])]
            print(one.name, by_hand.run(sys.argv[1], one), sep="\n")
