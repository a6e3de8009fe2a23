"""From an archive, folder or repository to encoded samples, on any number of processes."""

import contextlib
import functools
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX

from lib.caption.journal import Row
from lib.datasets.clips import Clip, LeftOut, find_clips, full_caption
from lib.datasets.source import fetch_hub_dataset, open_data
from lib.errors import UserError
from lib.pipelines.library_logs import silence_libraries
from lib.progress import Report, progress_line
from lib.weights.cache import cache_folder
from training.base import load_text_encoder, load_vae, scaling_factor
from training.config import TrainingConfig
from training.devices import free_memory, from_main, gather_in_order
from training.groups import DataConfig
from training.latents import Encodings, LatentCache, Section, encode_clip, encode_prompts, model_digest
from training.plan import Plan

WITHOUT_CAPTION = "no caption: "
REMEDY = "With autocaption=true a model captions the clips that have no caption."


@dataclass(kw_only=True, slots=True)
class Data:
    """The samples of a run."""

    sections: list[Section]
    left_out: list[LeftOut]
    encodings: Encodings
    vae: AutoencoderKLCogVideoX | None
    """The VAE for the image condition, without its decoder; None for text to video."""
    scaling_factor: float
    """The VAE's, by which latents are multiplied."""
    captions: list[Row] = field(default_factory=list)
    """With autocaption, the origin of every clip's caption."""


@contextlib.contextmanager
def found_clips(
    config: DataConfig, work: Path, accelerator: Accelerator, *, stop: threading.Event, report: Report
) -> Iterator[tuple[list[Clip], list[LeftOut]]]:
    """Find the data set's clips with the captions of their owner, and the clips that are left out.

    An archive is unpacked below `work` until the block ends; what is downloaded from the Hub stays in the
    cache folder. With autocaption a clip's caption may be empty. Raises UserError when there is nothing to
    train on, Stopped while it unpacks or downloads.
    """
    try:
        if config.input_videos is None:
            cache = cache_folder() / "datasets"
            folder = from_main(
                accelerator, lambda: fetch_hub_dataset(config.dataset_name, cache, report, stop=stop)
            )
        else:
            source = Path(config.input_videos)
            folder = from_main(accelerator, lambda: open_data(source, work, stop=stop))
        clips, left_out = _find(config, folder)
        report_left_out(left_out, report)
        if not config.autocaption and any(each.reason.startswith(WITHOUT_CAPTION) for each in left_out):
            report(REMEDY)
        yield clips, left_out
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)


def encode_data(
    config: TrainingConfig, plan: Plan, clips: list[Clip], left_out: list[LeftOut], accelerator: Accelerator,
    *, stop: threading.Event, report: Report,
) -> Data:  # fmt: skip
    """Encode captions and clips, each process its share; text encoder and VAE decoder are freed afterwards.

    Raises UserError when no clip can be used, or one cannot and on_bad_clip is stop; Stopped.
    """
    silence_libraries()
    settings = config.data
    affixes = {name: getattr(settings, name) for name in ("trigger_word", "caption_prefix", "caption_suffix")}
    clips = [replace(clip, caption=full_caption(clip.caption, **affixes)) for clip in clips]
    parts = {name: model_digest(plan.folder / name) for name in ("vae", "text_encoder", "tokenizer")}
    dtype = str(plan.dtype).removeprefix("torch.")
    cache = LatentCache(cache_folder() / "latents")
    text_key = f"{parts['text_encoder']} {parts['tokenizer']} {plan.spec.text_tokens} {dtype}"
    encodings = Encodings(cache, text_key=text_key)
    prompts = ["", *config.prior_prompts, *config.validation.prompts, *(clip.caption for clip in clips)]
    if accelerator.is_main_process:
        encode_prompts(
            prompts, encodings, load=lambda: load_text_encoder(plan), tokens=plan.spec.text_tokens,
            device=plan.device, report=report, stop=stop,
        )  # fmt: skip
        free_memory()
    tiling = config.compute.enable_tiling
    # With a full cache, text to video never loads it.
    vae = functools.cache(lambda: load_vae(plan, tiling=tiling))
    share = clips[accelerator.process_index :: accelerator.num_processes]
    outcomes: list[list[Section] | LeftOut] = []
    for done, clip in enumerate(share, start=1):
        outcome = encode_clip(
            clip, plan.sampling, cache, vae=vae, vae_key=f"{parts['vae']} {dtype} tiled {tiling}",
            images=plan.is_i2v, stop=stop,
        )  # fmt: skip
        outcomes.append(outcome)
        report(progress_line("encoding clips", done, len(share)))
    outcomes = gather_in_order(outcomes, accelerator)
    sections = [section for outcome in outcomes if isinstance(outcome, list) for section in outcome]
    unusable = [outcome for outcome in outcomes if isinstance(outcome, LeftOut)]
    report_left_out(unusable, report)
    left_out = [*left_out, *unusable]
    report_other_lengths(plan, sections, report)
    check_left_out(settings, left_out, usable=len(sections))
    if accelerator.is_main_process:
        samples = {path for section in sections for side in section.files for path in side}
        cache.trim(samples | {encodings.prompt_path(text) for text in prompts})
    encoder = vae() if plan.is_i2v else None
    if encoder is not None:
        del encoder.decoder
    vae.cache_clear()
    free_memory()
    return Data(
        sections=sections,
        left_out=left_out,
        encodings=encodings,
        vae=encoder,
        scaling_factor=scaling_factor(plan.folder),
    )


def check_left_out(config: DataConfig, left_out: list[LeftOut], *, usable: int) -> None:
    """Raise UserError when no clip is left, or a clip is left out and on_bad_clip is stop."""
    listed = "\n".join(f"  {each.name}: {each.reason}" for each in left_out)
    if not usable:
        raise UserError(f"no clip can be used:\n{listed}")
    if left_out and config.on_bad_clip == "stop":
        raise UserError(f"{len(left_out)} clips cannot be used, and on_bad_clip is stop:\n{listed}")


def report_left_out(left_out: list[LeftOut], report: Report) -> None:
    """Report which clips are left out, and why."""
    for each in left_out:
        report(f"left out: {each.name}: {each.reason}")


def report_other_lengths(plan: Plan, sections: list[Section], report: Report) -> None:
    """Report lengths for which a base with learned positions has none and diffusers computes them."""
    others = sorted({section.frames for section in sections} - {plan.spec.frames})
    if others and plan.spec.size_rule == "fixed":
        report(
            f"samples of {', '.join(map(str, others))} frames: {plan.spec.name} learned its positions for "
            f"{plan.spec.frames} and gets computed ones here, as in predictions of those lengths; for "
            f"predictions of {plan.spec.frames} frames train on clips that are long enough"
        )


def _find(config: DataConfig, folder: Path) -> tuple[list[Clip], list[LeftOut]]:
    columns = {"video_column": config.video_column, "caption_column": config.caption_column}
    try:
        return find_clips(folder, **columns, need_captions=not config.autocaption)
    except UserError as error:
        if config.autocaption or WITHOUT_CAPTION not in str(error):
            raise
        raise UserError(f"{error} {REMEDY}") from error
