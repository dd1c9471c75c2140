"""Hooks that watch or replace what the parts of a model read and return, for a while and in one
thread.

The model does not know about them: PyTorch calls a hook before or after a module runs. Hooks can be
removed in any order, and other threads that use the model meanwhile are not affected.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from minillava.llama import Context
from minillava.llava import Llava


class Hooks:
    """Hooks that act in the thread that made them, until `close` or the end of a `with`."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before(self, module: nn.Module, act: Callable[..., Any]) -> None:
        """Call act(module, arguments) before the module runs. If it returns a tuple, that replaces
        the arguments."""
        self._handles.append(module.register_forward_pre_hook(self._here(act)))

    def after(self, module: nn.Module, act: Callable[..., Any]) -> None:
        """Call act(module, arguments, output) after the module ran. If it does not return None,
        that replaces the output."""
        self._handles.append(module.register_forward_hook(self._here(act)))

    def attention(self, module: nn.Module, change: Callable[[Context], Context | None]) -> None:
        """Replace the context of a decoder layer's attention by change(context), which may have
        another `attend` or `mask`; None leaves the context as it is."""

        def act(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x, context = arguments
            changed = change(context)
            return None if changed is None else (x, changed)

        self.before(module, act)

    def _here(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def in_our_thread(*given: Any) -> Any:
            return act(*given) if threading.get_ident() == self._thread else None

        return in_our_thread


@contextmanager
def attending(model: nn.Module, attend: Callable[..., Any]) -> Iterator[None]:
    """Inside this block `attend` computes every attention of the model, also the vision tower's,
    and for every thread: the model is another one for a while, not one that is watched."""
    before = {module: module.attend for module in model.modules() if "attend" in vars(module)}
    try:
        for module in before:
            module.attend = attend  # type: ignore[assignment]
        yield
    finally:
        for module, own in before.items():
            module.attend = own


def step_by_step(model: Llava) -> Llava:
    """The same model with the plain steps of loop.py, for a loop whose layers are watched: a
    compiled step (fast/compiled.py) calls no hooks, and one that a GPU begins before its turn
    (fast/ahead.py) would be seen with the token before."""
    plain = copy.copy(model)
    plain.decoding = None
    return plain
