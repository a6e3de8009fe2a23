"""Training steps a second and peak memory, beside a plain loop in the manner of CogVideo's own trainer.

    script/bench training [--pairs 3] [--steps 60] [--batch 1] [--clips 200] [--frames 49]
    script/bench training --gpu [--base-precision fp8] [--steps 10]

The first form trains tiny-i2v on rendered clips, the two in turn in processes of their own, with the same
base, clips, batch, rank and threads. The plain loop (bench/seed_style_training.py) runs as CogVideo's launch
scripts run theirs, with gradient checkpointing, and once more without. The second form measures the shape of
CogVideoX-5B-I2V with random weights, 49 frames of 720x480, rank 128, batch 1, on this machine's GPU.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "weights" / "tiny-i2v"
RANK = 128
FIVE_B = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 16,
    "num_layers": 42,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}
STEP_FLOPS = 1.24e15
"""Of one step of that shape with gradient checkpointing."""
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench training", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--layers", type=int, default=FIVE_B["num_layers"], help="with --gpu: fewer to try")
    parser.add_argument("--base-precision", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure_service(options, options.measure)
    if options.gpu:
        return measure_shape(options)
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Both trainers in turn, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        render_clips(clips, options.clips, options.frames)
        rows: dict[str, list[dict]] = {"service": [], "plain, as launched": [], "plain, no checkpointing": []}
        for pair in range(options.pairs):
            for name in rows if pair % 2 == 0 else reversed(rows):
                rows[name].append(run(name, options, Path(folder), clips))
            shown = (
                f"{n} {r[-1]['steps_per_second']:.2f} steps/s, {r[-1]['peak_bytes'] / 1e6:.0f} MB"
                for n, r in rows.items()
            )
            print(f"pair {pair + 1}: " + "; ".join(shown), flush=True)
    for other in list(rows)[1:]:
        for figure, text in (("steps_per_second", "steps a second"), ("peak_bytes", "peak memory")):
            ratios = [a[figure] / b[figure] for a, b in zip(rows["service"], rows[other], strict=True)]
            print(
                f"service / {other}: {text} {statistics.median(ratios):.2f} "
                f"(median of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
            )


def run(name: str, options: argparse.Namespace, folder: Path, clips: Path) -> dict:
    """One training in a process of its own; what it printed."""
    sizes = [str(options.steps), str(options.batch)]
    if name == "service":
        command = [sys.executable, "-P", "-m", "bench.training", "--measure", str(clips)]
        command += ["--steps", sizes[0], "--batch", sizes[1], "--frames", str(options.frames)]
    else:
        plain = str(ROOT / "bench" / "seed_style_training.py")
        checkpointing = "1" if name == "plain, as launched" else "0"
        command = [sys.executable, plain, str(BASE), str(clips), *sizes, str(RANK), checkpointing]
    settings = {"COGVIDEOX_CACHE": str(folder / "cache"), "COGVIDEOX_MODEL": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_service(options: argparse.Namespace, clips: Path) -> None:
    """The service's trainer in this process: from decoding to the last step."""
    from lib.compute import limit_spinning

    limit_spinning()
    from training.config import TrainingConfig
    from training.trainer import train

    config = TrainingConfig(
        input_videos=str(clips),
        max_train_steps=options.steps + WARM_UP,
        train_batch_size=options.batch,
        max_num_frames=options.frames,
        rank=RANK,
        checkpointing_steps=10**6,
        seed=0,
    )
    moments: list[tuple[float, int]] = []

    def report(line: str) -> None:
        if line.startswith("progress: training "):
            moments.append((time.perf_counter(), int(line.split()[2].partition("/")[0])))

    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", report=report)
    (began, first), (ended, last) = moments[0], moments[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"steps_per_second": (last - first) / (ended - began), "peak_bytes": peak}))


def measure_shape(options: argparse.Namespace) -> None:
    """Seconds a step and peak memory of the released shape with random weights, on the GPU."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    from training import objective
    from training.adapter import add_adapter
    from training.base import store_in_fp8

    if not torch.cuda.is_available():
        raise SystemExit("--gpu needs an NVIDIA GPU; there is none that torch sees.")
    device, dtype = "cuda", torch.bfloat16
    ceiling = matmul_ceiling(device, dtype)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        transformer = CogVideoXTransformer3DModel(**FIVE_B | {"num_layers": options.layers})
        vae = AutoencoderKLCogVideoX().requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    del vae.decoder
    parameters = add_adapter(transformer, rank=RANK, alpha=RANK, targets=["to_q", "to_k", "to_v", "to_out.0"])
    if options.base_precision == "fp8":
        store_in_fp8(transformer, dtype)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    latents = torch.randn(1, 13, 16, 60, 90, device=device)
    text = torch.randn(1, 226, 4096, device=device, dtype=dtype)
    image = torch.rand(1, 3, 1, 480, 720, device=device, dtype=dtype) * 2 - 1
    rotary = objective.rotary_tables(transformer.config, latents.shape, device)
    alphas = torch.tensor([0.5])

    def step() -> None:
        with torch.no_grad():
            condition = vae.encode(image).latent_dist.sample().transpose(1, 2)
        noise = torch.randn_like(latents)
        hidden = objective.model_input(objective.noised(latents, noise, alphas), condition).to(dtype)
        with torch.autocast(device, dtype):
            predicted = transformer(
                hidden,
                encoder_hidden_states=text,
                timestep=torch.tensor([500], device=device),
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
        objective.losses(predicted, latents, noise, alphas).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for index in range(options.steps + WARM_UP):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if index >= WARM_UP:
            seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    flops = STEP_FLOPS * options.layers / FIVE_B["num_layers"]
    print(
        f"{torch.cuda.get_device_name()}, base {options.base_precision}, {options.layers} layers: "
        f"{median:.2f} s a step, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, "
        f"{flops / median / ceiling:.0%} of the matmul ceiling of {ceiling / 1e12:.0f} TFLOP/s"
    )


def matmul_ceiling(device: str, dtype: object) -> float:
    """FLOP/s of large matrix products on this device."""
    import torch

    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - begun)


def render_clips(folder: Path, count: int, frames: int) -> None:
    """Clips of the synthetic world with captions."""
    from lib.video import write_video
    from tiny import world
    from tiny.captions import canonical_caption

    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        asked = world.ALL_COMBINATIONS[rng.integers(len(world.ALL_COMBINATIONS))]
        scene = world.sample_scene(asked, rng, from_start=True, frames=frames)
        write_video(world.render(scene), folder / f"{index:05d}.mp4", fps=8, format="mp4", metadata={})
        (folder / f"{index:05d}.txt").write_text(canonical_caption(asked))


if __name__ == "__main__":
    main()
