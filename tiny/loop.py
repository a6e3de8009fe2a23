"""Shared by all trainings: processes, checkpoints, averaged weights, learning rate, logging."""

import contextlib
import copy
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A training process: one on a GPU; on a CPU one per core, which is faster than threads."""

    rank: int
    count: int
    device: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average_gradients(self, module: nn.Module) -> None:
        """Average gradients over the processes."""
        if self.count == 1:
            return
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.count
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def mean(self, value: float) -> float:
        """Return the mean of a value over the processes."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(total)
        return float(total) / self.count

    def rng(self, seed: int, step: int) -> np.random.Generator:
        """Return a generator that depends on seed, step and rank only, so that runs can be resumed."""
        return np.random.default_rng((seed, step, self.rank))

    def torch_generator(self, seed: int, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(self.rng(seed, step).integers(2**62)))


def launch(function: Callable, processes: int, *arguments: object) -> None:
    """Run function(worker, *arguments) in each process and wait."""
    if torch.cuda.is_available() or processes == 1:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        function(Worker(rank=0, count=1, device=device), *arguments)
        return
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, args=(function, processes, port, arguments), nprocs=processes)


def _run(rank: int, function: Callable, processes: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    function(Worker(rank=rank, count=processes, device="cpu"), *arguments)
    dist.destroy_process_group()


class Average:
    """An exponential moving average of a module's parameters, whose decay grows with the steps."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for mean, value in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


def learning_rate(step: int, total: int, *, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Return the learning rate: linear warm-up, then cosine decay from peak to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def autocast(device: str) -> torch.autocast:
    """Autocast to bf16, which is 1.4 to 1.8 times as fast as fp32 on CPUs with AMX."""
    return torch.autocast(device, torch.bfloat16)


@contextlib.contextmanager
def attention_in_fp32() -> Iterator[None]:
    """Run attention outside autocast: its bf16 backward is ten times slower on a CPU than fp32."""
    original = nn.functional.scaled_dot_product_attention

    def attend(query, key, value, **options):
        with torch.autocast(query.device.type, enabled=False):
            return original(query.float(), key.float(), value.float(), **options).to(value.dtype)

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def save_checkpoint(path: Path, **state: object) -> None:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict | None:
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def resume(
    checkpoint: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer, steps: int
) -> int:
    """Load a checkpoint of `save_training`, if there is one, and return the step to go on with.

    The number of steps must be the same, since the learning rate depends on it.
    """
    state = load_checkpoint(checkpoint)
    if state is None:
        return 0
    if state["steps"] != steps:
        raise SystemExit(
            f"{checkpoint} was started with {state['steps']} steps in all; give the same number."
        )
    module.load_state_dict(state["model"])
    average.module.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save_training(
    checkpoint: Path,
    module: nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    steps: int,
    **others: object,
) -> None:
    """Write what `resume` reads, and `others`; `step` is the number of steps that are done."""
    save_checkpoint(
        checkpoint,
        model=module.state_dict(),
        average=average.module.state_dict(),
        optimizer=optimizer.state_dict(),
        step=step,
        steps=steps,
        **others,
    )


class Log:
    """Prints metrics and appends them to a .jsonl next to the checkpoint, in the main process only."""

    def __init__(self, path: Path, worker: Worker) -> None:
        self.path, self.worker, self.started = path, worker, time.time()

    def __call__(self, **figures: float) -> None:
        if not self.worker.is_main:
            return
        figures["seconds"] = round(time.time() - self.started, 1)
        print("  ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
