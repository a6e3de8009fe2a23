"""Predicted and measured memory peaks, stage by stage.

    script/bench memory [--setting NAME ...] [--offload text ...] [--json FILE]

Each setting is a model with random weights in a process of its own: a few layers of a released checkpoint's
width and its complete VAE, loaded and run for one or two steps as the service does it. On a CPU the peak is
that of the process, minus what was resident after imports; on a GPU it is what PyTorch's allocator has given
out, under each plan, for complete checkpoints and their default clips.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lib.models.specs import SPECS
from lib.settings import Offload

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from lib.generation.request import Request
    from lib.pipelines.machine import Machine

GIB = 2**30
ROOT = Path(__file__).resolve().parent.parent
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""Let glibc return freed tensors at once. Otherwise it keeps up to 32 MiB of them in its heap, where gaps add
a third to what the VAE takes for a small clip, and in some runs more than in others."""
COLUMNS = ("setting", "stage", "predicted", "measured", "ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A model and a request. None stands for the checkpoint's own value."""

    model: str
    width: int
    height: int
    frames: int
    dtype: str = "bfloat16"
    layers: int | None = 2
    text_layers: int | None = 1
    guidance: float = 6.0
    tiled: bool = False
    lora: str = ""
    """Layers that get a LoRA, by their names' ends."""
    offload: Offload = "resident"


ATTENTION = "to_q to_k to_v to_out.0"
ON_CPU = {
    "5b, float32": Setting(model="cogvideox-5b", width=176, height=128, frames=9, dtype="float32"),
    "5b, 17 frames": Setting(model="cogvideox-5b", width=208, height=160, frames=17),
    "5b, no guidance": Setting(model="cogvideox-5b", width=240, height=176, frames=13, guidance=1.0),
    "5b, LoRA": Setting(model="cogvideox-5b", width=224, height=144, frames=9, lora=ATTENTION),
    "5b, tiles": Setting(model="cogvideox-5b", width=384, height=112, frames=9, tiled=True),
    "2b, float32": Setting(model="cogvideox-2b", width=160, height=112, frames=17, dtype="float32", layers=5),
    "5b-i2v": Setting(model="cogvideox-5b-i2v", width=192, height=160, frames=9),
    "1.5-5b": Setting(model="cogvideox1.5-5b", width=208, height=144, frames=33, layers=3),
    "1.5-5b-i2v": Setting(model="cogvideox1.5-5b-i2v", width=176, height=176, frames=17),
}
ON_GPU = {
    spec.name: Setting(
        model=spec.name, width=spec.width, height=spec.height, frames=spec.frames, dtype=spec.dtype,
        layers=None, text_layers=None,
    )
    for spec in SPECS.values()
    if spec.task != "caption" and spec.repository
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench memory", description=__doc__.split("\n")[0])
    parser.add_argument("--setting", action="append", help="one of those that are printed; default all")
    parser.add_argument("--offload", nargs="+", default=["resident"], help="on a GPU, plans to measure")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(measure(Setting(**json.loads(options.measure)))))
    if options.write:
        return write(Path(options.write[0]), Setting(**json.loads(options.write[1])))
    found = {}
    print(" | ".join(COLUMNS))
    for name, setting in settings(options.offload).items():
        if options.setting and name not in options.setting:
            continue
        done = in_another_process("--measure", json.dumps(asdict(setting)))
        found[name] = asdict(setting) | json.loads(done.stdout.splitlines()[-1])
        print_rows(name, found[name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def in_another_process(*arguments: str) -> subprocess.CompletedProcess:
    """Run this command in a process of its own, to measure its memory."""
    command = [sys.executable, "-P", "-m", "bench.memory", *arguments]
    return subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)


def settings(offloads: list[str]) -> dict[str, Setting]:
    """Return the settings for this machine."""
    import torch

    if not torch.cuda.is_available():
        return ON_CPU
    return {
        f"{name}, {offload}": replace(setting, offload=offload)
        for name, setting in ON_GPU.items()
        for offload in offloads
    }


def print_rows(name: str, found: dict) -> None:
    for stage, (predicted, measured) in found["stages"].items():
        print(f"{name} | {stage} | {predicted / GIB:.2f} | {measured / GIB:.2f} | {predicted / measured:.3f}")
    predicted, measured = (max(pair[side] for pair in found["stages"].values()) for side in (0, 1))
    figures = f"{predicted / GIB:.2f} | {measured / GIB:.2f} | {predicted / measured:.3f}"
    print(f"{name} | peak of all | {figures}", flush=True)


def measure(setting: Setting) -> dict:
    """Load, generate, and return [predicted, measured] bytes by stage, and the bytes of the weights."""
    import torch

    from lib.lora.attach import attached_loras
    from lib.memory.model import MemoryModel
    from lib.pipelines.machine import Machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = SPECS[setting.model]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / setting.model
        in_another_process("--write", str(folder), json.dumps(asdict(setting)))
        machine = Machine(device=device, free_bytes=None, dtype=setting.dtype)
        memory = MemoryModel.of(spec, folder, machine)
        meter = Meter(device)
        pipeline = load(folder, machine, setting, meter)
        request = request_for(setting)
        generator = _measured_generator()(spec=spec, pipeline=pipeline, report=lambda line: None)
        generator.meter = meter
        generator.plan = SimpleNamespace(tiled=lambda clip, lora_bytes: setting.tiled)
        generator.frames(request)
    adapted, lora_bytes = attached_loras(pipeline.transformer)
    clip = request.clip(adapted=adapted)
    peaks = memory.peaks(clip, setting.offload, tiled=setting.tiled, lora_bytes=lora_bytes)
    peaks["denoising"] = max(peaks["denoising"], peaks.pop("image_encoding", 0))  # the pipeline does both
    return {
        "stages": {stage: [peaks[stage], meter.peaks[stage]] for stage in peaks},
        "weights": sum(memory.part_bytes().values()),
    }


def write(folder: Path, setting: Setting) -> None:
    """Write the setting's model, at the request's size where positions are stored."""
    from bench._released import write_random_model

    spec = SPECS[setting.model]
    changes = {}
    if spec.size_rule == "fixed":
        changes = {"sample_height": setting.height // 8, "sample_width": setting.width // 8}
    write_random_model(
        folder, spec, {"transformer": changes}, layers=setting.layers, text_layers=setting.text_layers
    )


def load(folder: Path, machine: "Machine", setting: Setting, meter: "Meter") -> "DiffusionPipeline":
    """Load as the service does, and read memory-mapped weights once, so that no stage is charged for them."""
    import accelerate  # noqa: F401, and peft: from here on memory is the model's
    import peft

    from lib.generation.generator import Generator  # noqa: F401
    from lib.pipelines.load import load_pipeline

    load_pipeline_of_nothing()
    meter.begin()
    spec = SPECS[setting.model]
    pipeline = load_pipeline(spec, folder, machine, offload=setting.offload)
    if setting.lora:
        config = peft.LoraConfig(r=64, target_modules=setting.lora.split())
        pipeline.transformer.add_adapter(config)
        pipeline.transformer.to(pipeline.transformer.dtype)
    if setting.offload == "resident":
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
            for weight in part.parameters():
                weight.sum()
    return pipeline


def load_pipeline_of_nothing() -> None:
    """Load the embedded model once, so that imports and set-up do not count."""
    from lib.generation.generator import Generator
    from lib.pipelines.load import load_pipeline
    from lib.pipelines.machine import Machine

    for name in ("tiny-t2v", "tiny-i2v"):
        spec, folder = SPECS[name], ROOT / "weights" / name
        machine = Machine(device="cpu", free_bytes=None, dtype="float32")
        pipeline = load_pipeline(spec, folder, machine)
        request = request_for(Setting(model=name, width=spec.width, height=spec.height, frames=spec.frames))
        Generator(spec=spec, pipeline=pipeline, report=lambda line: None).frames(request)


def request_for(setting: Setting) -> "Request":
    from PIL import Image

    from lib.generation.request import Request

    image = Image.new("RGB", (setting.width, setting.height), (90, 120, 30))
    return Request(
        prompt="a red circle moves right on a black background", negative_prompt="", num_inference_steps=2,
        guidance_scale=setting.guidance, num_frames=setting.frames, width=setting.width,
        height=setting.height, fps=8, seed=1, use_dynamic_cfg=False, scheduler="dpm",
        image=image if SPECS[setting.model].task == "i2v" else None,
    )  # fmt: skip


def _measured_generator() -> type:
    from lib.generation.generator import Generator

    class Measured(Generator):
        """A generator that reports to a meter when stages start and end."""

        meter: Meter

        @contextmanager
        def timed(self, stage: str) -> Iterator[None]:
            with self.meter.stage(stage), super().timed(stage):
                yield

    return Measured


@dataclass(slots=True)
class Meter:
    """Peak bytes by stage: of this process since `begin`, or of PyTorch's allocator on a GPU."""

    device: str
    peaks: dict[str, int] = field(default_factory=dict)
    _resident: int = 0

    def begin(self) -> None:
        if self.device == "cpu":
            give_back()
            self._resident = status_bytes("VmRSS")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.device == "cpu":
            give_back()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from here
            yield
            self.peaks[name] = status_bytes("VmHWM") - self._resident
            return
        import torch

        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        self.peaks[name] = torch.cuda.max_memory_allocated()


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def give_back() -> None:
    """Return memory that the C library keeps to the system, so that the next stage is not charged for it."""
    import ctypes
    import gc

    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


if __name__ == "__main__":
    main()
