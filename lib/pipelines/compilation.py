"""Compiled transformer blocks: one compilation that all blocks share, kept on disk for the next start.

Blocks are what repeats; compiling them alone takes a fraction of the time that the whole transformer would,
and leaves what happens around them (hooks of offloading, sharing among processes, forecast steps) as it is.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

from lib import optional
from lib.weights.cache import cache_folder

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

    from lib.generation.generator import Generator

VARIANTS = 64
"""Compilations kept in memory: with and without guidance, the first size and any other, each LoRA."""
KEPT = "TORCHINDUCTOR_CACHE_DIR"


def missing_tool(device: str) -> str | None:
    """What has to be installed before anything can be compiled for `device`; None when all is there."""
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "a C++ compiler, and none was found: install one (apt-get install g++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's own headers, and they were not found: install them (apt-get install python3-dev)"
    if device != "cpu" and not optional.available("triton"):
        return "triton, which comes with torch for CUDA: install that torch"
    return None


def compile_blocks(transformer: "CogVideoXTransformer3DModel", *, backend: object = "inductor") -> None:
    """Compile the blocks when they are first called, and again for what differs: another size, a LoRA.

    A failed compilation raises and leaves nothing: the next call compiles anew. Blocks compute equal to
    rounding. What several processes exchange in a block is left uncompiled.
    """
    import torch
    import torch._dynamo
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    apart = torch.compiler.disable(dispatch_attention_fn)
    for processor in transformer.attn_processors.values():
        processor.dispatch_shared = apart
    compiled = torch.compile(transformer.transformer_blocks[0].forward.__func__, backend=backend)
    for block in transformer.transformer_blocks:
        block.forward = MethodType(compiled, block)


def keep_compilations() -> None:
    """Let the compiler keep its work in the cache's folder `compiled`, or where TORCHINDUCTOR_CACHE_DIR says.

    Only this user can put anything there: it will be run. To be called before the compiler is imported.
    """
    if KEPT not in os.environ:
        folder = cache_folder() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[KEPT] = str(folder)


def warm_up(generator: "Generator") -> None:
    """Compile at once what a usual request needs: one step at the model's own size, with guidance.

    Of the model's own length, or the longest that the plan has room for.
    """
    import torch
    from PIL import Image

    from lib.generation.request import build_request

    spec = generator.spec
    image = Image.new("RGB", (spec.width, spec.height)) if spec.task == "i2v" else None
    request = build_request(
        spec,
        prompt="",
        negative_prompt="",
        num_inference_steps=1,
        guidance_scale=spec.guidance_scale,
        num_frames=generator.plan.frames if generator.plan else None,
        width=spec.width,
        height=spec.height,
        fps=None,
        seed=0,
        use_dynamic_cfg=False,
        scheduler="default",
        image=image,
    )
    transformer = generator.pipeline.transformer
    device = generator.pipeline._execution_device
    shape = (1, spec.text_tokens, transformer.config.text_embed_dim)
    nothing = torch.zeros(shape, device=device, dtype=transformer.dtype)
    report, generator.report = generator.report, lambda line: None
    try:
        generator.latents(request, (nothing, nothing), check=lambda: None)
    finally:
        generator.report = report
