"""How modules of minillava are found: on first use, by the names that they define, and by second
names.

Every module imports this one, so its import must cost next to nothing: the rest of Python's import
machinery is imported where it is needed.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType


def on_first_use(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`. homes: name -> the module that defines it, which is imported when
    the name is first used.

    So `from minillava.generate import generate` works, although `python -m minillava.generate`,
    which imports the package first, must read the flags before torch is imported."""

    def fetch(name: str) -> Any:
        if name in homes:
            return vars(__import__(f"{package}.{homes[name]}", fromlist=[name]))[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return fetch


_RENAMED = {
    "minillava.inspect": "minillava.inspection",
    "minillava.trace": "minillava.tracing",
    "minillava.contrast": "minillava.generate.contrast",
}


def _real_name(name: str) -> str | None:
    """`minillava.tracing.page` for `minillava.trace.page`; None for a name that is not a second
    name."""
    for other, real in _RENAMED.items():
        if name == other or name.startswith(other + "."):
            return real + name[len(other) :]
    return None


class _Renamed:
    """Finds and loads `minillava.inspect` and `minillava.trace`, whose folders have other names,
    and `minillava.contrast`, which has moved.

    Python puts the folder of a script first on its path, and the current folder for `python -m`: a
    folder named `inspect` would then be what the standard library, and so torch, gets for `import
    inspect`. Both names of a module are one module object.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> "ModuleSpec | None":
        if (real_name := _real_name(name)) is None:
            return None
        # A local import, since importing minillava must cost next to nothing.
        from importlib.util import find_spec

        real = find_spec(real_name)
        if real is None:
            return None
        # self has a loader's methods; importlib's class would be imported for its name alone
        spec = type(real)(name, self, origin=real.origin)  # type: ignore[arg-type]
        spec.loader_state = real_name
        spec.submodule_search_locations = real.submodule_search_locations
        return spec

    def create_module(self, spec: "ModuleSpec") -> "ModuleType":
        module = __import__(spec.loader_state, fromlist=["*"])
        # Python is about to overwrite module.__spec__ with the spec of the second name.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str) -> "CodeType | None":
        """The code that `python -m` runs."""
        from importlib.util import find_spec

        real: Any = find_spec(_real_name(name) or name)
        return real.loader.get_code(real.name)


def find_renamed() -> None:
    """Let Python find the modules that have a second name."""
    # It must be asked first: otherwise `minillava.trace.page` would be loaded a second time.
    sys.meta_path.insert(0, _Renamed())
