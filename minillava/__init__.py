"""minillava: LLaVA-1.5 in pure PyTorch.

    import minillava
    assistant = minillava.load("path/to/llava-1.5-7b-hf")
    print(assistant.ask("x.jpg", "What is in this image?"))

Reading order, which is the order of the data: config, options, image, templates, prompt, tokenizer,
attention, vision, projector, cache, llama, llava, sampling, streaming, loop, labels, assistant. The
folders are everything else. CLASSROOM.md has the questions that people ask on the way, and
exercises.
"""

import sys

if sys.argv[:1] == ["-m"] and any("minillava" in word for word in sys.orig_argv[1:3]):
    # `python -m minillava.chat` begins with this file, and looks for the other only afterwards:
    # Ctrl-C at this moment showed a traceback of Python's own files.
    from minillava.cli.doors import leave_on_ctrl_c

    leave_on_ctrl_c()

from minillava.files.modules import find_renamed, on_first_use

__version__ = "0.1.0"
__all__ = ["Assistant", "__version__", "load"]

# Fetched on first use: importing minillava alone stays instant, and `python -m minillava.generate`
# does not find its own module already imported.
__getattr__ = on_first_use(__name__, {"load": "assistant", "Assistant": "assistant"})


def __dir__() -> list[str]:
    # for help(), and for the Tab key of a prompt, which would find nothing: `load` is fetched on
    # first use
    return sorted({*globals(), *__all__})


find_renamed()
