"""One model in a process of its own, measured from the process's start; tools/bench.py starts it
and reads the JSON.

Each implementation imports what it needs, opens the weights, and answers questions of the same ids
about a picture. It is given numbers instead of a text: so all read the same positions, and a peer's
tokenizer takes no time.
"""

import json
import sys
import time
from pathlib import Path

clock = time.monotonic  # the same for all processes of a machine


class Minillava:
    """This repository, as `python -m minillava.generate` opens it."""

    def __init__(self, folder: str, dtype: str, device: str, compile: bool):
        # run from a checkout, installed or not
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        import minillava
        from minillava.options import KINDS

        self.imported = clock()
        quantize, dtype = (dtype, "auto") if dtype in KINDS else (None, dtype)
        self.assistant = minillava.load(
            folder, device=device, dtype=dtype, quantize=quantize, compile=compile
        )
        self.weights = list(self.assistant.model.state_dict().values())

    def answer(self, picture: str, ids: list[int], tokens: int) -> dict:
        from minillava.loop import Options, steps

        model, started = self.assistant.model, clock()
        patches, vision = None, 0.0
        if picture:
            pixels = self.assistant.image_processor([picture])
            began = clock()
            patches = self.assistant._encode(pixels)
            vision = after(patches) - began
        spliced = model.splice([ids], patches)
        options = Options(max_new_tokens=tokens, min_new_tokens=tokens)
        made, times = [], []
        for step in steps(model, spliced, options):
            made += step.ids
            times.append(clock())
        return {"started": started, "vision": vision, "times": times, "ids": made}


class Transformers:
    """Its defaults, with its fastest attention; `compile`: generate's static cache and
    torch.compile."""

    def __init__(
        self, folder: str, dtype: str, device: str, compile: bool, attention: str = "sdpa"
    ):
        import torch
        from transformers import AutoImageProcessor, LlavaForConditionalGeneration

        self.imported = clock()
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            device_map=None if device == "cpu" else device,
        )
        self.weights, self.compile = list(self.model.state_dict().values()), compile

    def answer(self, picture: str, ids: list[int], tokens: int) -> dict:
        import torch
        from PIL import Image

        model, marks, times, started = self.model, [], [], clock()
        given, config = {}, model.config
        if picture:
            with Image.open(picture) as opened:
                pixels = self.processor(opened.convert("RGB"), return_tensors="pt").pixel_values
            given["pixel_values"] = pixels.to(model.device, model.dtype)
            side = config.vision_config.image_size // config.vision_config.patch_size
            at = ids.index(IMAGE)
            ids = [*ids[:at], *[config.image_token_id] * side**2, *ids[at + 1 :]]
        hooks = [
            model.model.vision_tower.register_forward_pre_hook(lambda *_: marks.append(clock())),
            model.model.multi_modal_projector.register_forward_hook(
                lambda _, x, y: marks.append(after(y))
            ),
        ]

        class Clock:
            """What generate tells a streamer: the prompt, then each token."""

            def put(self, value: torch.Tensor) -> None:
                times.append(clock())

            def end(self) -> None:
                pass

        settings = {}
        if self.compile:
            from transformers import CompileConfig

            settings = {"cache_implementation": "static", "compile_config": CompileConfig()}
            # it compiles on a GPU only, unless told so
            settings["compile_config"]._compile_all_devices = True
        input_ids = torch.tensor([ids], device=model.device)
        made = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, streamer=Clock(),
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **given, **settings,
        )  # fmt: skip
        for hook in hooks:
            hook.remove()
        vision = marks[1] - marks[0] if marks else 0.0
        return {
            "started": started,
            "vision": vision,
            "times": times[1:],
            "ids": made[0, len(ids) :].tolist(),
        }


class LlamaCpp:
    """llama.cpp by its Python binding: the language model alone, as many positions of text."""

    def __init__(self, folder: str, dtype: str, device: str, compile: bool):
        import os

        from llama_cpp import Llama

        self.imported, threads = clock(), len(os.sched_getaffinity(0))  # as many as torch takes
        layers = 0 if device == "cpu" else -1
        self.model = Llama(
            f"{folder}/{dtype}.gguf", n_ctx=2048, n_batch=1024, n_ubatch=1024, n_threads=threads,
            n_threads_batch=threads, n_gpu_layers=layers, verbose=False,
        )  # fmt: skip
        self.weights = []

    def answer(self, picture: str, ids: list[int], tokens: int) -> dict:
        import numpy as np
        from llama_cpp import llama_get_logits_ith

        started, times, made = clock(), [], []
        self.model.reset()
        self.model.eval([5 if i < 0 else i for i in ids])
        while True:
            logits = llama_get_logits_ith(self.model.ctx, -1)
            made.append(int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax()))
            times.append(clock())
            if len(made) == tokens:
                return {"started": started, "vision": 0.0, "times": times, "ids": made}
            self.model.eval(made[-1:])


IMAGE = -200
PEERS = {"minillava": Minillava, "transformers": Transformers, "llama.cpp": LlamaCpp}


def after(tensor) -> float:
    """The time when a GPU has made it."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return clock()


def peak_memory(device: str) -> int:
    """Bytes, at most, that this process had in memory, mapped files included; of a GPU, what torch
    had there."""
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
    model = PEERS[job["peer"]](
        job["folder"], job["dtype"], job["device"], job.get("compile", False)
    )
    opened = clock()
    result = {"import": model.imported - started, "open": opened - model.imported}
    if job.get("touch"):  # a file that is only mapped has not been read yet
        import torch

        for tensor in model.weights:
            tensor.contiguous().view(torch.uint8).flatten()[::4096].sum()
        result["touch"] = clock() - opened
    answers = [
        model.answer(job["picture"], job["ids"], job["tokens"]) for _ in range(job["questions"])
    ]
    if answers:
        last = answers[-1]
        result["process"] = answers[0]["times"][0] - started
        result["vision"] = last["vision"]
        result["first"] = last["times"][0] - last["started"]
        steps = [
            after - before for before, after in zip(last["times"], last["times"][1:], strict=False)
        ]
        result["decode"] = sum(steps) / len(steps) if steps else None
        result["ids"] = last["ids"]
    result["peak"] = peak_memory(job["device"])
    if model.weights:  # bytes of the weights, and of one number of the cache
        result["weights"] = sum(
            {tensor.data_ptr(): tensor.nbytes for tensor in model.weights}.values()
        )
        result["width"] = model.weights[0].itemsize
    print("\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
