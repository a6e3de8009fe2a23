"""Exporting the trained models to weights/ in the layout of the released ones, shared components once."""

import os
import shutil
from pathlib import Path

from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from transformers import GenerationConfig

from lib.caption.model import CaptionModel
from tiny import loop
from tiny.caption_checkpoint import save_model
from tiny.captioner import build_caption_tokenizer, caption_config
from tiny.networks import LATENT_CHANNELS, SCHEDULER, build_vae
from tiny.painter import build_painter_tokenizer
from tiny.tokenizer import build_tokenizer, tie_capitals
from tiny.train_painter import Painter, load_painter_vae, painter_pipeline
from tiny.train_transformer import TextToLatents
from tiny.writer import build_writer, build_writer_tokenizer

SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")
PIPELINES = {"t2v": CogVideoXPipeline, "i2v": CogVideoXImageToVideoPipeline}


def export(folder: Path, target: Path) -> None:
    """Export the existing ones of folder/{t2v,i2v,caption}.pt, with vae.pt and decoder.pt, to target/tiny-*.

    VAE and transformers are stored in fp16, the text encoder, which transformers loads in its stored dtype,
    in fp32. Components that tiny-i2v shares with tiny-t2v are relative links.
    """
    for task in PIPELINES:
        if state := loop.load_checkpoint(folder / f"{task}.pt"):
            vae, decoder = (loop.load_checkpoint(folder / f"{part}.pt") for part in ("vae", "decoder"))
            _export_one(task, state, vae, decoder, target)
    if state := loop.load_checkpoint(folder / "caption.pt"):
        _export_captioner(state, target)
    if state := loop.load_checkpoint(folder / "writer.pt"):
        _export_writer(state, target)
    if state := loop.load_checkpoint(folder / "painter.pt"):
        _export_painter(state, folder, target)


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
    partial = _partial(target, task)
    pipeline.save_pretrained(partial)
    if task == "i2v":
        for part in SHARED:
            shutil.rmtree(partial / part)
            os.symlink(Path("..") / "tiny-t2v" / part, partial / part)
    _finish(partial)


def _export_captioner(state: dict, target: Path) -> None:
    tokenizer = build_caption_tokenizer()
    model = CaptionModel(caption_config(len(tokenizer)))
    model.load_state_dict(state["average"])
    partial = _partial(target, "caption")
    partial.mkdir()
    save_model(model, partial)
    tokenizer.save_pretrained(partial)
    _finish(partial)


def _export_writer(state: dict, target: Path) -> None:
    """Export the writer in fp16, with sampling that hardly varies."""
    tokenizer = build_writer_tokenizer()
    model = build_writer(len(tokenizer))
    model.load_state_dict(state["average"])
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_k=20, top_p=0.9, eos_token_id=2, pad_token_id=0
    )
    partial = _partial(target, "writer")
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _finish(partial)


def _export_painter(state: dict, folder: Path, target: Path) -> None:
    tokenizer = build_painter_tokenizer()
    painter = Painter(len(tokenizer))
    painter.load_state_dict(state["average"])
    pipeline = painter_pipeline(painter.half().eval(), load_painter_vae(folder).half(), tokenizer)
    partial = _partial(target, "painter")
    pipeline.save_pretrained(partial)
    _finish(partial)


def _partial(target: Path, task: str) -> Path:
    partial = target / f"tiny-{task}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def _finish(partial: Path) -> None:
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
