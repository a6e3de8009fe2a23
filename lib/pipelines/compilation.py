"""Compiled transformer blocks: one compilation that all blocks share, kept on disk for the next start.

Compiling the repeated blocks takes a fraction of the time that the whole transformer would, and leaves the
rest (offloading, sharing among processes, forecast steps) as it is.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch._dynamo
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from lib import optional
from lib.pipelines.attention import processors
from lib.weights.cache import cache_folder

VARIANTS = 64
"""Compilations kept in memory: with and without guidance, the first size and any other, each LoRA."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def missing_tool(device: str) -> str | None:
    """Return what has to be installed before anything can be compiled for `device`; None if nothing."""
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "a C++ compiler, and none was found: install one (apt-get install g++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's own headers, and they were not found: install them (apt-get install python3-dev)"
    if device != "cpu" and not optional.available("triton"):
        return "triton, which comes with torch for CUDA: install that torch"
    return None


def compile_blocks(
    transformer: CogVideoXTransformer3DModel, *, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile the blocks when they are first called, and again for another size or a LoRA.

    Blocks compute the same to rounding. A failed compilation raises and leaves nothing: the next call starts
    it from scratch. What several processes exchange within a block is not compiled.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    dispatch = cast(Callable[..., torch.Tensor], torch.compiler.disable(dispatch_attention_fn))
    for processor in processors(transformer):
        processor.parallel_dispatch = dispatch
    transformer._repeated_blocks = ["CogVideoXBlock"]  # diffusers 0.42 lists none for this class
    transformer.compile_repeated_blocks(backend=backend)


def keep_compilations() -> None:
    """Keep compilations in the cache's folder `compiled`, or where TORCHINDUCTOR_CACHE_DIR says.

    Only this user can write there: the files are programs that will be run.
    """
    # torch puts its default into the variable when it is imported.
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
        folder = cache_folder() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[CACHE_VARIABLE] = str(folder)
