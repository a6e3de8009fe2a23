"""Released shapes with random weights on this machine's GPU, compared with plain diffusers.

    script/bench gpu [--model cogvideox-5b ...] [--variant exact ...] [--steps 50] [--json FILE]

For each model a folder of its shape is written (23 GB for 5B, in the temporary folder), and each variant runs
in a process of its own: one request of two steps, which compiles and warms up, then one that is timed from
the prompt to the mp4. `plain` is a diffusers pipeline with everything on the GPU. Prints seconds per step and
per clip, peak memory, and the share of the FLOP/s that the GPU reaches in bfloat16 matrix products alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench._arguments import at_least_one
from bench._levels import markdown
from lib.models.specs import SPECS, ModelSpec

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b")
VARIANTS: dict[str, dict[str, str]] = {
    "plain": {},
    "exact": {},
    "compiled": {"COGVIDEOX_COMPILE": "1"},
    "fp8, compiled": {"COGVIDEOX_COMPILE": "1", "COGVIDEOX_QUANTIZATION": "fp8-dynamic"},
    "balanced": {},
    "fast": {},
    "fast, compiled": {"COGVIDEOX_COMPILE": "1"},
}
"""Variables of the server; a speed in the name is the request's."""
COLUMNS = ("variant", "s a step", "s a clip", "of plain", "peak GiB", "of the ceiling")
PROMPT = "A red fox trots along a snowy forest path at dawn."
CEILING_SIZE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--layers", type=int, help="of the transformer, instead of the model's")
    parser.add_argument("--text-layers", type=int, help="of the text encoder, instead of 24")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--try-out", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure, options.steps)
    import torch

    if not (torch.cuda.is_available() or options.try_out):
        sys.exit("script/bench gpu needs a GPU; script/bench denoise compares on a CPU.")
    ceiling = matmul_ceiling()
    print(f"{device_name()}: {ceiling / 1e12:.1f} TFLOP/s in bfloat16 matrix products")
    found = {"device": device_name(), "ceiling": ceiling, "steps": options.steps, "models": {}}
    for name in options.model or MODELS:
        found["models"][name] = measure_model(name, ceiling, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def measure_model(name: str, ceiling: float, options: argparse.Namespace) -> dict[str, dict]:
    """Run the variants of one model, print its table and return the figures by variant."""
    from bench._released import TRY_OUT, step_flops, write_random_model

    results: dict[str, dict] = {}
    here = {"PYTHONPATH": str(ROOT), "COGVIDEOX_LOCAL_SOURCES": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        spec, changes = SPECS[name], TRY_OUT if options.try_out else {}
        folder = write_random_model(
            Path(temporary) / name, spec, changes, layers=options.layers, text_layers=options.text_layers
        )
        flops = step_flops(folder)
        for variant in dict.fromkeys(["plain", *(options.variant or VARIANTS)]):
            command = [sys.executable, "-P", "-m", "bench.gpu", "--measure", str(folder), variant]
            done = subprocess.run(
                [*command, "--steps", str(options.steps)],
                env=os.environ | VARIANTS[variant] | here | {"COGVIDEOX_MODEL": str(folder)},
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                print(f"{variant}: failed, see above", flush=True)
                continue
            results[variant] = json.loads(done.stdout.splitlines()[-1])
            step = results[variant]["denoising"] / options.steps
            results[variant] |= {"step": step, "share": flops / step / ceiling}
    plain = results.get("plain", {}).get("clip", float("nan"))
    lines = [
        [
            variant,
            f"{figures['step']:.3f}",
            f"{figures['clip']:.1f}",
            f"{figures['clip'] / plain:.2f}",
            f"{figures['peak'] / 2**30:.1f}",
            f"{100 * figures['share']:.0f}%",
        ]
        for variant, figures in results.items()
    ]
    print(f"\n{name}, {options.steps} steps\n\n{markdown(COLUMNS, lines)}", flush=True)
    return results


def measure(folder: str, variant: str, steps: int) -> None:
    """Print one variant's figures as a line of JSON; runs in a process of its own."""
    import torch

    from lib.pipelines.library_logs import silence_libraries

    silence_libraries()
    make = plain_clips(Path(folder)) if variant == "plain" else service_clips(Path(folder), variant)
    make(2)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    denoising = make(steps)
    clip = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(json.dumps({"clip": clip, "denoising": denoising, "peak": peak}))


def plain_clips(folder: Path) -> Callable[[int], float]:
    """Make a clip with diffusers alone and return the seconds of denoising."""
    import diffusers
    import torch
    from diffusers.utils import export_to_video

    from lib.models.derive import derive_spec

    spec = derive_spec(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = (
        getattr(diffusers, spec.pipeline_class).from_pretrained(folder, dtype=torch.bfloat16).to(device)
    )
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": grey_image(spec)} if spec.task == "i2v" else {}

    def make(steps: int) -> float:
        marks: list[float] = []

        def on_step(pipe: object, step: int, timestep: int, tensors: dict) -> dict:
            if step in (0, steps - 1):
                if device == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())
            return tensors

        frames = pipeline(
            **image,
            prompt=PROMPT,
            num_inference_steps=steps,
            guidance_scale=6.0,
            num_frames=spec.frames,
            height=spec.height,
            width=spec.width,
            max_sequence_length=spec.text_tokens,
            generator=torch.Generator().manual_seed(1),
            callback_on_step_end=on_step,
        ).frames[0]
        export_to_video(frames, str(folder / "plain.mp4"), fps=spec.fps)
        return (marks[-1] - marks[0]) * steps / max(1, steps - 1)

    return make


def service_clips(folder: Path, variant: str) -> Callable[[int], float]:
    """Make a clip with the predictor that serves requests and return the same."""
    from lib.generation.step_schedule import SPEEDS
    from lib.models.derive import derive_spec
    from lib.predictors.start import start_video

    spec = derive_spec(folder)
    predictor = start_video(spec.task)
    image = {}
    if spec.task == "i2v":
        image["image"] = folder / "first.png"
        grey_image(spec).save(image["image"])
    speed = next((name for name in SPEEDS if name in variant), "exact")

    class Metrics(dict):
        record_metric = dict.__setitem__

    def make(steps: int) -> float:
        metrics = Metrics()
        predictor(
            metrics,
            **image,
            prompt=PROMPT,
            negative_prompt="",
            num_inference_steps=steps,
            guidance_scale=6.0,
            num_frames=None,
            width=None,
            height=None,
            fps=None,
            seed=1,
            use_dynamic_cfg=False,
            scheduler="default",
            speed=speed,
            output_format="mp4",
        )
        return metrics["denoising_seconds"]

    return make


def grey_image(spec: ModelSpec):
    from PIL import Image

    return Image.new("RGB", (spec.width, spec.height), (128, 128, 128))


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def matmul_ceiling(seconds: float = 1.0) -> float:
    """Measure the FLOP/s of large bfloat16 matrix products on this device."""
    import torch

    cuda = torch.cuda.is_available()
    size = CEILING_SIZE if cuda else 512
    one, other = (torch.randn(size, size, device="cuda" if cuda else "cpu").bfloat16() for _ in range(2))
    wait = torch.cuda.synchronize if cuda else lambda: None
    one @ other
    wait()
    products, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < seconds:
        for _ in range(10):
            one @ other
        wait()
        products += 10
    return products * 2 * size**3 / taken


if __name__ == "__main__":
    main()
