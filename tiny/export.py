"""Writes the trained parts as ordinary diffusers folders under weights/, shared parts once."""

import os
import shutil
from pathlib import Path

from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline

from tiny import loop
from tiny.networks import LATENT_CHANNELS, SCHEDULER, build_vae
from tiny.tokenizer import build_tokenizer, tie_capitals
from tiny.train_transformer import TextToLatents

SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")
PIPELINES = {"t2v": CogVideoXPipeline, "i2v": CogVideoXImageToVideoPipeline}


def export(folder: Path, target: Path) -> None:
    """Read folder/{vae,t2v,i2v}.pt, decoder.pt too if there; write target/tiny-t2v and target/tiny-i2v.

    Convolutions and transformers are stored in fp16; the text encoder, which transformers would load in
    the type it is stored in, in fp32. What tiny-i2v shares with tiny-t2v are relative links.
    """
    for task in PIPELINES:
        if state := loop.load_checkpoint(folder / f"{task}.pt"):
            vae, decoder = (loop.load_checkpoint(folder / f"{part}.pt") for part in ("vae", "decoder"))
            _export_one(task, state, vae, decoder, target)


def _export_one(task: str, state: dict, vae_state: dict, decoder_state: dict | None, target: Path) -> None:
    tokenizer = build_tokenizer()
    model = TextToLatents(len(tokenizer), task)
    model.load_state_dict(state["average"])
    tie_capitals(model.text_encoder.get_input_embeddings(), tokenizer)
    vae = build_vae(round(state["scaling_factor"], 6))
    vae.load_state_dict(vae_state["average"])
    if decoder_state is not None:
        vae.decoder.load_state_dict(decoder_state["average"])
    channels = model.transformer.config.in_channels
    assert channels == LATENT_CHANNELS * (2 if task == "i2v" else 1)
    pipeline = PIPELINES[task](
        tokenizer=tokenizer,
        text_encoder=model.text_encoder.eval(),
        vae=vae.half().eval(),
        transformer=model.transformer.half().eval(),
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
    )
    final, partial = target / f"tiny-{task}", target / f"tiny-{task}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    if task == "i2v":
        for part in SHARED:
            shutil.rmtree(partial / part)
            os.symlink(Path("..") / "tiny-t2v" / part, partial / part)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
