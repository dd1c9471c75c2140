"""The door: what a folder of weights holds, and with --doctor whether the model is well."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from PIL import Image

from minillava.checkpoint.place import choose_device, choose_dtype
from minillava.cli.messages import Messages, print_json
from minillava.cli.opening import find_weights, open_assistant
from minillava.files.pictures import open_image
from minillava.files.tensors import DTYPES
from minillava.inspection import doctor
from minillava.inspection.report import QUANTISED, Report, inspect_folder
from minillava.inspection.text import as_text, keys_text
from minillava.options import dtype_name


def run(args: argparse.Namespace) -> int:
    messages = Messages(args.verbose, args.quiet)
    picture = None if args.image is None else open_image(args.image)
    weights = find_weights(args.folder or args.weights, messages)
    named = (
        "revision",
        "vision_tower",
        "model_base",
        "adapter",
        "template",
        "system",
        "image_aspect_ratio",
    )
    report = inspect_folder(weights, **{name: vars(args)[name] for name in named})
    if not args.json:
        print(as_text(report))
    if args.keys and not args.json:
        print(f"\n{keys_text(report)}")
    findings = []
    for finding in _see_doctor(args, weights, report, picture, messages) if args.doctor else ():
        findings.append(finding)
        if not args.json:
            lead = "\n" if len(findings) == 1 else ""
            print(f"{lead}{finding.status:<8} {finding.check}: {finding.text}", flush=True)
    if args.json:
        report.doctor = [asdict(finding) for finding in findings]
        print_json({"loadable": report.loadable, **asdict(report)})
    failed = any(finding.status == doctor.FAILED for finding in findings)
    return int(failed or not report.loadable)


def _see_doctor(
    args: argparse.Namespace,
    weights: str,
    report: Report,
    picture: Image.Image | None,
    messages: Messages,
) -> Iterator[doctor.Finding]:
    """The findings, one by one as they are made; those about the model only where it can be opened
    and fits."""
    yield doctor.environment()
    if not report.loadable:
        yield doctor.Finding("opening", doctor.FAILED, "not tried: something is missing, see above")
        return
    plain = [
        tensor for tensor in report.tensors if tensor["dtype"] in map(dtype_name, DTYPES.values())
    ]
    largest = max(plain, key=lambda tensor: math.prod(tensor["shape"]))
    stored, device = getattr(torch, largest["dtype"]), choose_device(args.device)
    parameters = sum(part["parameters"] for part in report.parts.values())
    dtype = choose_dtype(args.dtype, device, stored, parameters)
    yield doctor.precision(device, dtype, stored, parameters)
    kind = args.quantize or next(
        (row for name, row in QUANTISED.items() if name in report.dtypes), None
    )
    table, half = report.memory[kind or "bfloat16"], 1 if kind else dtype.itemsize / 2
    needed, cache = (
        int(table["weights"] * half),
        int((table["full_context"] - table["weights"]) * half),
    )
    mapped = (
        device == "cpu"
        and set(report.dtypes) == {largest["dtype"]}
        and dtype == stored
        and not report.adapted
        and not args.pack
    )
    memory = doctor.memory(needed, cache, device, mapped)
    yield memory
    if memory.status != doctor.FAILED:
        yield from doctor.examine(open_assistant(args, weights, messages), picture, args.system)
