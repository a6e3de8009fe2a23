"""Compare a LoRA in every mode that a CPU can run with diffusers' own pipeline.

`python -m tests.lora_matrix FOLDER` does it for quantized weights, in a process of its own: torchao is
installed separately (.venv/extras), and slows down every import of diffusers.
"""

import json
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline
from torch import Tensor

from lib.generation.generator import Generator
from lib.generation.request import Request, build_request
from lib.lora.attach import Loras
from lib.lora.source import Choice, parse
from lib.models.specs import SPECS, StepSchedule
from lib.pipelines.acceleration import Acceleration
from lib.pipelines.compilation import compile_blocks
from lib.pipelines.load import load_pipeline
from lib.pipelines.machine import Machine
from lib.pipelines.offload import place
from tests.lora_factory import WEIGHTS, save_lora
from tiny.evaluate import DEFAULTS

SPEC = replace(
    SPECS["tiny-t2v"],
    num_inference_steps=6,
    balanced=StepSchedule(computed=5, first=2, last=1),
    fast=StepSchedule(computed=4, first=2, last=1),
)
"""tiny-t2v in few steps."""
SPEEDS = ("exact", "balanced", "fast")
OFFLOADS = ("resident", "text", "model", "group")
QUANTIZED = {
    "int8": [
        *(("plain", offload, "exact") for offload in OFFLOADS),
        ("compiled", "resident", "exact"),
        ("compiled", "group", "fast"),
    ],
    "int8-dynamic": [("plain", "model", "exact"), ("compiled", "resident", "fast")],
    "fp8": [("plain", "model", "exact"), ("compiled", "resident", "fast")],
}
"""Quantization -> the modes it is tried in: torchao is slow on a CPU."""
SCALE = 0.7
CPU = Machine(device="cpu", free_bytes=0, dtype="float32")


def request(speed: str) -> Request:
    inputs = {"prompt": "a green square moves up", "seed": 7, "num_inference_steps": 6, "speed": speed}
    return build_request(SPEC, **DEFAULTS | inputs)


def lora_file(folder: Path) -> Path:
    """Return a LoRA on the attention projections and on other layers."""
    file = folder / "lora.safetensors"
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "norm1.linear"]
    return file if file.exists() else save_lora(file, alpha=8, target_modules=targets)


def latents(generator: Generator, speed: str) -> Tensor:
    """Return a clip's latents."""
    wanted = request(speed)
    with torch.no_grad():
        embeddings = generator._prompts.encode(wanted.prompt, wanted.negative_prompt)
    return generator.latents(wanted, embeddings, check=lambda: None)


@cache
def expected(kind: str, speed: str, file: Path | None) -> Tensor:
    """Return the latents of diffusers' own pipeline, with quantized weights unless `kind` is none."""
    pipeline = CogVideoXPipeline.from_pretrained(WEIGHTS / "tiny-t2v", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if kind != "none":
        from lib.pipelines.quantization import quantize_pipeline

        quantize_pipeline(pipeline, kind, device="cpu")
    if file is not None:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="plain")
        pipeline.set_adapters(["plain"], [SCALE])
    return latents(Generator(spec=SPEC, pipeline=pipeline, report=lambda line: None), speed)


@cache
def loaded(kind: str, computed: str, offload: str) -> tuple[Generator, Loras]:
    """`computed`: plain or compiled (traced by the compiler, without its code generator)."""
    pipeline = load_pipeline(SPEC, WEIGHTS / "tiny-t2v", CPU, acceleration=Acceleration(quantization=kind))
    if computed == "compiled":
        compile_blocks(pipeline.transformer, backend="eager")
    if offload != "resident":
        _offload_to_the_cpu()
        place(pipeline, offload, device="cpu")
    quiet = {"report": lambda line: None}
    loras = Loras(pipeline=pipeline, spec=SPEC, offload=offload, **quiet)
    return Generator(spec=SPEC, pipeline=pipeline, **quiet), loras


def outcome(kind: str, computed: str, offload: str, speed: str, file: Path) -> dict[str, Any]:
    """Return the distances from diffusers' latents with the LoRA, and before and after it without."""
    generator, loras = loaded(kind, computed, offload)
    choice = Choice(address=parse(str(file)), scale=SCALE)
    base, with_lora = (expected(kind, speed, each) for each in (None, file))
    before = latents(generator, speed)
    with loras.applied([choice]):
        applied = latents(generator, speed)
    after = latents(generator, speed)
    for key in list(loras._attached):
        loras._detach(loras._attached.pop(key).name)
    unloaded = latents(generator, speed)
    return {
        "base": _distance(before, base),
        "lora": _distance(applied, with_lora),
        "after": _distance(after, before),
        "unloaded": _distance(unloaded, before),
        "lora changes": _distance(with_lora, base),
    }


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@cache
def _offload_to_the_cpu() -> None:
    """Let the GPU's offload hooks use the CPU as their device."""
    offload = DiffusionPipeline.enable_model_cpu_offload
    DiffusionPipeline.enable_model_cpu_offload = lambda self, **named: offload(
        self, **{"device": "cpu"} | named
    )


def main(folder: Path) -> None:
    os.environ["COGVIDEOX_LOCAL_SOURCES"] = "1"
    found = {}
    for kind, ways in QUANTIZED.items():
        for way in ways:
            found[" ".join((kind, *way))] = outcome(kind, *way, lora_file(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
