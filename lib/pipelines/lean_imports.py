"""diffusers' CogVideoX pipelines without the libraries that a plain request never uses.

Importing them as they are takes two thirds of a cold start, most of it for names that only stand in
annotations and type checks: transformers' model code, peft, and PyTorch's compiler with sympy behind it. Here
such a name becomes a promise that brings its library in when it is first used; the first LoRA, for one, does.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PROMISED = ("transformers", "peft")
PIPELINES = "diffusers.pipelines.cogvideo"
COMPILER = "torch._dynamo"

_lock = threading.Lock()


def import_diffusers() -> ModuleType:
    """diffusers, with its CogVideoX pipelines imported; as they are where one of those libraries is there.

    To be called before anything else of the process imports diffusers.
    """
    with _lock:
        if f"{PIPELINES}.pipeline_cogvideox" not in sys.modules:
            if any(_imported(name) for name in (*PROMISED, COMPILER)):
                _import_pipelines()
            else:
                _import_lean()
    import diffusers

    return diffusers


def _import_pipelines() -> None:
    importlib.import_module(f"{PIPELINES}.pipeline_cogvideox")
    importlib.import_module(f"{PIPELINES}.pipeline_cogvideox_image2video")


def _import_lean() -> None:
    with _compiler_left_out():
        from diffusers.utils import peft_utils, torch_utils  # first: they look for what is installed

        _skip_unless_imported(torch_utils, "is_compiled_module", lambda module: False)
        for name in ("scale_lora_layers", "unscale_lora_layers"):
            _skip_unless_imported(peft_utils, name, lambda *args, **kwargs: None)
        with _promised(*PROMISED):
            _import_pipelines()
    from diffusers.pipelines import pipeline_loading_utils

    _skip_unless_imported(pipeline_loading_utils, "_unwrap_model", lambda model: model)


class Promise:
    """A name of a library that is not imported yet. Calling it or asking it for anything imports it."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _kept(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._kept(), name)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self._kept()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        # While its library was never imported, nothing can be an instance.
        return _imported(self._module.partition(".")[0]) and isinstance(instance, self._kept())

    def __subclasscheck__(self, subclass: type) -> bool:
        return _imported(self._module.partition(".")[0]) and issubclass(subclass, self._kept())

    def __mro_entries__(self, bases: tuple) -> tuple[type, ...]:
        return (self._kept(),)

    def __or__(self, other: object) -> "Promise":
        return self  # only in annotations

    __ror__ = __or__

    def __repr__(self) -> str:
        return f"<promise of {self._module}.{self._name}>"


class _StandIn(ModuleType):
    """A module of a promised library: every name that is taken from it is a promise.

    Who keeps the module itself has the real one's names once it stands in no more.
    """

    _over = False

    def __getattr__(self, name: str) -> Any:
        if self._over:
            return getattr(importlib.import_module(self.__name__), name)
        if name.startswith("__"):
            raise AttributeError(name)
        return Promise(self.__name__, name)


class _Finder:
    """Finds stand-ins for the packages called `roots` and everything in them."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = roots
        self.made: list[_StandIn] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.roots:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(_StandIn(spec.name))
        return self.made[-1]

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _promised(*roots: str) -> Iterator[None]:
    """What is imported from these packages within is promises; afterwards they are imported as usual."""
    finder = _Finder(roots)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module in finder.made:
            sys.modules.pop(module.__name__, None)
            module._over = True


@contextmanager
def _compiler_left_out() -> Iterator[None]:
    """diffusers does without the compiler where that cannot be imported, but for functions it keeps from it.

    Those are marked by `torch.compiler.disable`, which means nothing as long as nothing is compiled: they
    are marked when they are called in a process that has imported the compiler.
    """
    import torch

    disable = torch.compiler.disable
    sys.modules[COMPILER] = None  # importing it raises ModuleNotFoundError
    torch.compiler.disable = _disable_later(disable)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        del sys.modules[COMPILER]


def _skip_unless_imported(module: ModuleType, name: str, instead: Callable) -> None:
    """Replace a function of diffusers that looks for compiled or peft's models while there can be none.

    It would import the compiler or peft for that, in every request.
    """
    function = getattr(module, name)

    @wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        needed = _imported(COMPILER) or _imported("peft")
        return (function if needed else instead)(*args, **kwargs)

    setattr(module, name, call)


def _imported(name: str) -> bool:
    """Whether a module is really there."""
    return not isinstance(sys.modules.get(name), (_StandIn, type(None)))


def _disable_later(disable: Callable) -> Callable:
    """`torch.compiler.disable`, postponed to the first call of a function that has a compiler around it."""

    def mark(
        function: Callable | None = None, recursive: bool = True, *, reason: str | None = None
    ) -> Callable:
        if function is None:
            return lambda given: mark(given, recursive, reason=reason)
        marked: list[Callable] = []

        @wraps(function)
        def call(*args: object, **kwargs: object) -> Any:
            if not marked and _imported(COMPILER):
                marked.append(disable(function, recursive, reason=reason))
            return (marked[0] if marked else function)(*args, **kwargs)

        return call

    return mark
