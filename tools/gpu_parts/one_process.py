"""One process that goes the way of several, so that its collectives run where there is one GPU: NCCL
on it, gloo on a CPU. `doors` starts it with torchrun; it prints the answer.

    python -m torch.distributed.run --nproc-per-node 1 tools/gpu_parts/one_process.py cuda "Where is the circle?"
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # run from a checkout, installed or not

from minillava.assistant import load
from minillava.checkpoint.folders import bundled_weights
from minillava.fast import parallel


def main(device: str, question: str) -> None:
    # Elsewhere one process of one has the whole model, and nobody to tell.
    parallel.launched = lambda: True
    parallel.WHOLE = None
    assistant = load(bundled_weights(), device=device, dtype="float32", parallel=True)
    if not isinstance(assistant.model.language_model, parallel.SharedLanguageModel):
        raise ValueError("the model was not shared, and no collective has run")
    try:
        print(assistant.ask(bundled_weights() / "example-1.png", question, max_new_tokens=40))
    finally:
        parallel.end_followers()


if __name__ == "__main__":
    main(*sys.argv[1:])
