"""Small models and processes that share them, for the tests of lib/distributed."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from lib.serving.registry import PROJECT
from tiny.networks import SCHEDULER, build_text_encoder, build_vae
from tiny.tokenizer import build_tokenizer

KINDS = {"t2v": CogVideoXPipeline, "i2v": CogVideoXImageToVideoPipeline}


def save_model(folder: Path, task: str = "t2v", *, heads: int = 4, second_family: bool = False) -> Path:
    """Save a pipeline with random weights, of the architecture of 5B or of 1.5."""
    torch.manual_seed(0)
    tokenizer, vae = build_tokenizer(), build_vae(0.7)
    i2v = task == "i2v"
    family = {"patch_size_t": 2, "patch_bias": False} if second_family else {}
    if second_family and i2v:
        family["ofs_embed_dim"] = 32
    if not second_family:
        family["use_learned_positional_embeddings"] = i2v
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=16 if i2v else 8,
        out_channels=8,
        num_layers=2,
        time_embed_dim=32,
        text_embed_dim=64,
        max_text_seq_length=20,
        sample_height=12,
        sample_width=16,
        sample_frames=17 if second_family else 9,
        patch_size=2,
        use_rotary_positional_embeddings=True,
        **family,
    )
    vae.register_to_config(invert_scale_latents=second_family and i2v)
    KINDS[task](
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
    ).save_pretrained(folder)
    return folder


RANK = """
import pickle, sys
from importlib import import_module
module, name, arguments, rank, count, store, result = pickle.load(open(sys.argv[1], "rb"))[int(sys.argv[2])]
import torch
from lib.distributed.process_group import ProcessGroup
torch.set_num_threads(1)
work = getattr(import_module(module), name)
group = ProcessGroup.join(rank=rank, count=count, device="cpu", store=store, seconds=300)
output = work(group, *arguments)
group.close()
pickle.dump(output, open(result, "wb"))
"""


def in_processes(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `work(group, *arguments)`, of a test module, in `count` processes, and return all results."""
    results = [folder / f"result{rank}" for rank in range(count)]
    tasks = [
        (work.__module__, work.__name__, arguments, rank, count, folder / "store", results[rank])
        for rank in range(count)
    ]
    (folder / "tasks").write_bytes(pickle.dumps(tasks))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder / "tasks"), str(rank)],
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": str(PROJECT), "COGVIDEOX_LOCAL_SOURCES": "1"},
        )
        for rank in range(count)
    ]
    try:
        assert [process.wait(timeout=300) for process in running] == [0] * count
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [pickle.loads(result.read_bytes()) for result in results]
