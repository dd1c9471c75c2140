"""minillava: LLaVA-1.5 in pure PyTorch.

    import minillava
    assistant = minillava.load("path/to/llava-1.5-7b-hf")
    print(assistant.ask("x.jpg", "What is in this image?"))

Reading order, which is the order of the data: config, image, prompt, tokenizer, attention, vision,
projector, cache, llama, llava, checkpoint, options, sampling, loop, beam, generate, assistant.
CLASSROOM.md has the questions that people ask on the way, and exercises.
"""

import sys

__version__ = "0.1.0"
__all__ = ["Assistant", "__version__", "load"]


def __getattr__(name: str):
    # `load` and `Assistant` are fetched on first use: importing minillava alone stays instant, and
    # `python -m minillava.generate` does not find its own module already imported.
    if name in ("load", "Assistant"):
        from minillava import assistant

        return vars(assistant)[name]
    raise AttributeError(f"module 'minillava' has no attribute {name!r}")


def __dir__() -> list[str]:
    # for help(), and for the Tab key of a prompt, which would find nothing: `load` is fetched on first use
    return sorted({*globals(), *__all__})


_FILES = {"minillava.inspect": "minillava.inspection", "minillava.trace": "minillava.tracing"}


class _Renamed:
    """Finds and loads `minillava.inspect` and `minillava.trace`, whose files have other names.

    Python puts the folder of a script first on its path, and the current folder for `python -m`: there a file
    `inspect.py` would be what the standard library, and so torch, gets for `import inspect`. Both names of a module
    are one module object. Python asks this finder last, and only for what nobody else has.
    """

    def find_spec(self, name, path=None, target=None):
        if name not in _FILES:
            return None
        from importlib.util import find_spec  # here, since importing minillava costs nothing

        real = find_spec(_FILES[name])
        return type(real)(name, self, origin=real.origin)

    def create_module(self, spec):
        module = __import__(_FILES[spec.name], fromlist=["*"])
        spec.loader_state = module.__spec__  # Python is about to write the spec of the other name over it
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name):
        """What `python -m` runs."""
        from importlib.util import find_spec

        return find_spec(_FILES[name]).loader.get_code(_FILES[name])


sys.meta_path.append(_Renamed())
