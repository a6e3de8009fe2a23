"""Convert a 5B-shaped float32 file: peak anonymous memory, and speed relative to copying the file.

script/bench convert [--gigabytes 6] [--dtype bfloat16] [--rounds 3] [--folder DIR]

The file has 5B's width, fewer layers and random values. Copying reads and writes the complete file in blocks,
in the same rounds and on the same disk. Both are timed until everything is on the disk.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lib.convert.configs import FAMILIES, transformer_config
from lib.convert.detect import TransformerSizes
from lib.convert.formats import write_torch
from lib.convert.keymap import TRANSFORMER, plan_to_sat, shape_of
from lib.convert.planning import model_shapes
from lib.convert.reading import MODEL
from lib.convert.writing import PlannedTensor, Progress

ROOT = Path(__file__).resolve().parent.parent
BLOCK_BYTES = 16 << 20
SAMPLE_SECONDS = 0.02
CONVERT = """
import os, sys, time
from pathlib import Path
from diffusers import CogVideoXTransformer3DModel
from lib.convert.models import to_diffusers, to_sat
started = time.perf_counter()
source, target, dtype, direction = sys.argv[1:]
if direction == "there":
    to_diffusers(transformer=Path(source), target=Path(target), dtype=dtype, report=lambda line: None)
else:
    to_sat(transformer=Path(source), target=Path(target), report=lambda line: None)
for path in (path for path in Path(target).rglob("*") if path.is_file()):
    with path.open("rb") as file:
        os.fsync(file.fileno())
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "model.pt"
        layers = write_source(source, options.gigabytes)
        size = source.stat().st_size
        print(f"{layers} layers of 5B's width in float32, {size / 1e9:.2f} GB -> {options.dtype}", flush=True)
        ratios, backs, peaks = [], [], {"there": 0, "back": 0}
        for _ in range(options.rounds):
            copying = copy_seconds(source, Path(folder) / "copy.pt")
            there, back = Path(folder) / "model", Path(folder) / "sat"
            seconds, peak = convert(source, there, options.dtype, "there")
            written = sum(path.stat().st_size for path in there.rglob("*.safetensors"))
            peaks["there"] = max(peaks["there"], peak)
            ratios.append(copying / seconds)
            copied = copying * written / size
            seconds, peak = convert(there, back, options.dtype, "back")
            peaks["back"] = max(peaks["back"], peak)
            backs.append(copied / seconds)
            shutil.rmtree(there)
            shutil.rmtree(back)
    for name, values, key in (("to diffusers", ratios, "there"), ("back to SAT", backs, "back")):
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:13} {statistics.median(values):.2f} times the speed of copying ({spread}), "
              f"peak anonymous memory {peaks[key] / 1e9:.2f} GB")  # fmt: skip


def write_source(path: Path, gigabytes: float) -> int:
    """Write a SAT checkpoint of 5B's width and about this size, and return its number of layers."""

    def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
        sizes = TransformerSizes(
            heads=48, head_dim=64, layers=layers, in_channels=16, out_channels=16, patch_size=2,
            patch_size_t=None, time_embed_dim=512, text_embed_dim=4096, ofs_embed_dim=None, positions=0,
            rotary=True,
        )  # fmt: skip
        shapes = model_shapes("transformer", transformer_config(sizes, FAMILIES["cogvideox-5b"], {}))
        plan = plan_to_sat(list(shapes), TRANSFORMER)
        return {name: shape_of(pieces, shapes) for name, pieces in plan.outputs.items()}

    def size_of(layers: int) -> int:
        return sum(4 * torch.Size(shape).numel() for shape in shapes_of(layers).values())

    layer = size_of(2) - size_of(1)
    layers = max(1, -(-int(gigabytes * 1e9 - size_of(1)) // layer) + 1)
    values = torch.randn(64 << 20)
    planned = []
    for name, shape in shapes_of(layers).items():
        count = torch.Size(shape).numel()
        planned.append(
            PlannedTensor(name=MODEL + name, pieces=[values[:count]], shape=shape, dtype=torch.float32)
        )
    write_torch(path, "module", planned, Progress("the source", planned, print))
    return layers


def copy_seconds(source: Path, target: Path) -> float:
    """Return how long it takes to read the file and write it again, until it is on the disk."""
    drop_cache(source)
    started = time.perf_counter()
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while block := reader.read(BLOCK_BYTES):
            writer.write(block)
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def convert(source: Path, target: Path, dtype: str, direction: str) -> tuple[float, int]:
    """Convert in a process of its own; return the seconds, without Python's start, and its peak memory."""
    for path in [source] if source.is_file() else source.rglob("*.safetensors"):
        drop_cache(path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CONVERT, str(source), str(target), dtype, direction],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"the conversion ended with {process.returncode}")
    return float(process.stdout.read()), peak


def anonymous_bytes(process: int) -> int:
    """Return the memory of a process that is not backed by a file: RssAnon of Linux."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else 0


def drop_cache(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
