"""One model in a process of its own, measured from the process's start; tools/bench.py starts it
and reads the JSON.

Each implementation imports what it needs, opens the weights, and answers questions of the same ids
about a picture. It is given numbers instead of a text: so all read the same positions, and a peer's
tokenizer takes no time.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

clock = time.monotonic  # the same for all processes of a machine


class Minillava:
    """This repository, as `python -m minillava.generate` opens it."""

    def __init__(self, job: dict):
        # run from a checkout, installed or not
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from minillava import load  # and with it torch
        from minillava.fast.packed import KIND as PACKED
        from minillava.options import KINDS

        self.imported = clock()
        name = job["dtype"]
        self.assistant = load(
            job["folder"],
            device=job["device"],
            dtype="auto" if name in KINDS else "bfloat16" if name == PACKED else name,
            quantize=name if name in KINDS else None,
            pack=name == PACKED,
            compile=job.get("compile", False),
        )
        self.weights = list(self.assistant.model.state_dict().values())

    def answer(self, pictures: list[str], ids: list[int], tokens: int) -> dict:
        from minillava.generate.inputs import encode_pixels
        from minillava.loop import Options, steps

        model, started = self.assistant.model, clock()
        patches, vision = None, 0.0
        if pictures:
            pixels = self.assistant.image_processor(pictures)
            began = clock()
            patches = encode_pixels(self.assistant.model, pixels)
            vision = after(patches) - began
        spliced = model.splice([ids], patches)
        options = Options(max_new_tokens=tokens, min_new_tokens=tokens)
        made, times = [], []
        for step in steps(model, spliced, options):
            made += step.ids
            times.append(clock())
        return {"started": started, "vision": vision, "times": times, "ids": made}


class Transformers:
    """transformers with its defaults and its fastest attention. compile: with generate's static
    cache and torch.compile."""

    def __init__(self, job: dict):
        import torch
        from transformers import AutoImageProcessor, LlavaForConditionalGeneration

        self.imported = clock()
        self.processor = AutoImageProcessor.from_pretrained(job["folder"])
        self.model = LlavaForConditionalGeneration.from_pretrained(
            job["folder"],
            dtype=getattr(torch, job["dtype"]),
            attn_implementation="sdpa",
            device_map=None if job["device"] == "cpu" else job["device"],
        )
        self.weights, self.compile = list(self.model.state_dict().values()), job["compile"]

    def answer(self, pictures: list[str], ids: list[int], tokens: int) -> dict:
        import torch

        clock_of_tokens, started = Clock(), clock()
        given, ids = self.inputs(pictures, ids)
        input_ids = torch.tensor([ids], device=self.model.device)
        with self.watched() as marks:
            made = self.model.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
                streamer=clock_of_tokens, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
                **given, **self.settings(),
            )  # fmt: skip
        return {
            "started": started,
            "vision": marks[1] - marks[0] if marks else 0.0,
            "times": clock_of_tokens.times[1:],  # without the prompt
            "ids": made[0, len(ids) :].tolist(),
        }

    def inputs(self, pictures: list[str], ids: list[int]) -> tuple[dict, list[int]]:
        """The pixels, and the ids, in which a picture's id is repeated for each of its positions."""
        from PIL import Image

        config = self.model.config
        if not pictures:
            return {}, ids
        shown = [Image.open(path).convert("RGB") for path in pictures]
        pixels = self.processor(shown, return_tensors="pt").pixel_values
        side = config.vision_config.image_size // config.vision_config.patch_size
        ids = [
            i
            for each in ids
            for i in ([config.image_token_id] * side**2 if each == IMAGE else [each])
        ]
        return {"pixel_values": pixels.to(self.model.device, self.model.dtype)}, ids

    def settings(self) -> dict:
        if not self.compile:
            return {}
        from transformers import CompileConfig

        settings = {"cache_implementation": "static", "compile_config": CompileConfig()}
        # it compiles on a GPU only, unless told so
        settings["compile_config"]._compile_all_devices = True
        return settings

    @contextmanager
    def watched(self) -> Iterator[list[float]]:
        """Note inside when encoding a picture began, and when it had become positions."""
        marks, model = [], self.model.model
        hooks = [
            model.vision_tower.register_forward_pre_hook(lambda *_: marks.append(clock())),
            model.multi_modal_projector.register_forward_hook(
                lambda _, x, y: marks.append(after(y))
            ),
        ]
        try:
            yield marks
        finally:
            for hook in hooks:
                hook.remove()


class Clock:
    """A streamer: transformers' generate calls it with the prompt, then with each token."""

    def __init__(self):
        self.times = []

    def put(self, value) -> None:
        self.times.append(clock())

    def end(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp by its Python binding: a language model at the dtype, and the vision tower in
    float16."""

    def __init__(self, job: dict):
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.imported, folder, threads = clock(), job["gguf"], job["threads"]
        on_gpu = job["device"] != "cpu"
        self.model = llama_cpp.Llama(
            f"{folder}/{job['dtype']}.gguf", n_ctx=2048, n_batch=1024, n_ubatch=1024, n_threads=threads,
            n_threads_batch=threads, n_gpu_layers=-1 if on_gpu else 0, verbose=False,
        )  # fmt: skip
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.n_threads, settings.print_timings = on_gpu, threads, False
        settings.warmup = False  # as the language model, and the others
        path = f"{folder}/mmproj.gguf".encode()
        self.eye = mtmd_cpp.mtmd_init_from_file(path, self.model.model, settings)
        if not self.eye:
            raise RuntimeError("llama.cpp cannot open mmproj.gguf")
        self.weights = []

    def answer(self, pictures: list[str], ids: list[int], tokens: int) -> dict:
        import numpy as np
        from llama_cpp import llama_get_logits_ith

        started, times, made, vision = clock(), [], [], 0.0
        (picture,) = pictures  # a second one has no place in its chunk
        self.model.reset()
        at = ids.index(IMAGE)
        self.model.eval(ids[:at])
        vision = self.read(picture)
        self.model.eval(ids[at + 1 :])
        while True:
            logits = llama_get_logits_ith(self.model.ctx, -1)
            made.append(int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax()))
            times.append(clock())
            if len(made) == tokens:
                return {"started": started, "vision": vision, "times": times, "ids": made}
            self.model.eval(made[-1:])

    def read(self, picture: str) -> float:
        """Prefill a picture after the cached positions; returns the seconds that encoding it took."""
        from ctypes import byref, c_int32

        from llama_cpp import mtmd_cpp as mtmd

        with self.chunk_of(picture) as chunk:
            began, past = clock(), c_int32()
            failed = mtmd.mtmd_encode_chunk(self.eye, chunk)
            vision = clock() - began
            failed = failed or mtmd.mtmd_helper_decode_image_chunk(
                self.eye, self.model.ctx, chunk, mtmd.mtmd_get_output_embd(self.eye),
                self.model.n_tokens, 0, self.model.n_batch, byref(past),
                mtmd.mtmd_helper_post_decode_callback(), None,
            )  # fmt: skip
        if failed:
            raise RuntimeError("llama.cpp cannot read the picture")
        self.model.n_tokens = past.value
        return vision

    @contextmanager
    def chunk_of(self, picture: str) -> Iterator:
        """The picture as what llama.cpp reads at once: its text is a marker, and nothing else."""
        from ctypes import c_uint8, pointer

        from llama_cpp import mtmd_cpp as mtmd
        from PIL import Image

        with Image.open(picture) as opened:
            pixels = opened.convert("RGB")
        numbers, marker = pixels.tobytes(), mtmd.mtmd_default_marker()
        numbers = (c_uint8 * len(numbers)).from_buffer_copy(numbers)
        bitmap = mtmd.mtmd_bitmap_init(*pixels.size, numbers)
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if mtmd.mtmd_tokenize(self.eye, chunks, pointer(text), bitmaps, 1):
                raise RuntimeError("llama.cpp cannot read the picture")
            count = mtmd.mtmd_input_chunks_size(chunks)
            found = [mtmd.mtmd_input_chunks_get(chunks, number) for number in range(count)]
            kind = mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
            yield next(each for each in found if mtmd.mtmd_input_chunk_get_type(each) == kind)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)


IMAGE = -200
PEERS = {"minillava": Minillava, "transformers": Transformers, "llama.cpp": LlamaCpp}


def after(tensor) -> float:
    """The time at which a GPU has finished it."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return clock()


def place_of(tensor) -> int:
    """What tells one memory from another; a packed tensor does not say where it is."""
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def peak_memory(device: str) -> int:
    """The largest number of bytes that this process had in memory, mapped files included; for a GPU,
    what torch had allocated there."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say how much memory a process had at most")


def main() -> int:
    started = float(sys.argv[1])
    job = json.loads(sys.argv[2])
    model = PEERS[job["peer"]](job)
    opened = clock()
    result = {"import": model.imported - started, "open": opened - model.imported}
    if job.get("touch"):  # a file that is only mapped has not been read yet
        import torch

        for tensor in model.weights:
            if tensor.is_mkldnn:  # packed, and so read
                continue
            tensor.contiguous().view(torch.uint8).flatten()[::4096].sum()
        result["touch"] = clock() - opened
    answers = [
        model.answer(job["pictures"], job["ids"], job["tokens"]) for _ in range(job["questions"])
    ]
    if answers:
        last = answers[-1]
        result["process"] = answers[0]["times"][0] - started
        result["vision"] = last["vision"]
        result["first"] = last["times"][0] - last["started"]
        steps = [after - before for before, after in pairwise(last["times"])]
        result["decode"] = sum(steps) / len(steps) if steps else None
        result["ids"] = last["ids"]
    result["peak"] = peak_memory(job["device"])
    if model.weights:  # bytes of the weights, and of one number of the cache
        result["weights"] = sum(
            {place_of(tensor): tensor.nbytes for tensor in model.weights}.values()
        )
        result["width"] = model.weights[0].itemsize
    print("\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
