"""From the configuration's archive, folder or repository to encoded samples, on however many processes."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lib.caption.journal import Row
from lib.datasets.clips import Clip, LeftOut, find_clips, full_caption
from lib.datasets.source import fetch_hub_dataset, open_data
from lib.errors import UserError
from lib.pipelines.load import silence_libraries
from lib.progress import Report
from lib.weights.cache import cache_folder
from training.config import TrainingConfig
from training.devices import from_main
from training.latents import (
    Encodings,
    LatentCache,
    Section,
    encode_clip,
    encode_prompts,
    model_digest,
)
from training.memory import free_memory
from training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKLCogVideoX

WITHOUT_CAPTION = "no caption: "
REMEDY = "With autocaption=true a model captions the clips that have no caption."


@dataclass(kw_only=True, slots=True)
class Data:
    """What the trainer learns from."""

    sections: list[Section]
    left_out: list[LeftOut]
    encodings: Encodings
    vae: "AutoencoderKLCogVideoX | None"
    """For the image condition, without its decoder; None for text to video."""
    scaling_factor: float
    """Of the latents."""
    captions: list[Row] = field(default_factory=list)
    """With autocaption, where every clip's caption is from."""


@contextlib.contextmanager
def found_clips(
    config: TrainingConfig, work: Path, accelerator: "Accelerator", *, stop: threading.Event, report: Report
) -> Iterator[tuple[list[Clip], list[LeftOut]]]:
    """The data set's clips. What an archive holds is below `work` for as long as the block lasts; what comes
    from the Hub stays in the cache folder, for other runs and for this one when it goes on.

    Captions are their owners', with autocaption empty where there is none. Raises UserError when there is
    nothing to train on; Stopped while it unpacks or downloads.
    """
    try:
        if config.dataset_name:
            kept = cache_folder() / "datasets"
            folder = from_main(
                accelerator, lambda: fetch_hub_dataset(config.dataset_name, kept, report, stop=stop)
            )
        else:
            folder = from_main(accelerator, lambda: open_data(Path(config.input_videos), work, stop=stop))
        clips, left_out = _find(config, folder)
        tell_left_out(left_out, report)
        if not config.autocaption and any(each.reason.startswith(WITHOUT_CAPTION) for each in left_out):
            report(REMEDY)
        yield clips, left_out
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)


def _find(config: TrainingConfig, folder: Path) -> tuple[list[Clip], list[LeftOut]]:
    columns = {"video_column": config.video_column, "caption_column": config.caption_column}
    try:
        return find_clips(folder, **columns, need_captions=not config.autocaption)
    except UserError as error:
        if config.autocaption or WITHOUT_CAPTION not in str(error):
            raise
        raise UserError(f"{error} {REMEDY}") from error


def encode_data(
    plan: Plan, clips: list[Clip], left_out: list[LeftOut], accelerator: "Accelerator", *,
    report: Report, check: Callable[[], None],
) -> Data:  # fmt: skip
    """Encode captions with what goes around them, then clips, each process its share; text encoder and VAE
    decoder are gone afterwards.

    Raises UserError when no clip can be used, or one cannot and on_bad_clip says stop.
    """
    silence_libraries()
    affixes = {
        name: getattr(plan.config, name) for name in ("trigger_word", "caption_prefix", "caption_suffix")
    }
    clips = [replace(clip, caption=full_caption(clip.caption, **affixes)) for clip in clips]
    parts = {name: model_digest(plan.folder / name) for name in ("vae", "text_encoder", "tokenizer")}
    cache = LatentCache(cache_folder() / "latents")
    text_key = f"{parts['text_encoder']} {parts['tokenizer']} {plan.spec.text_tokens} {plan.dtype}"
    encodings = Encodings(cache, text_key=text_key)
    prompts = [
        "",
        *plan.config.prior_captions,
        *plan.config.validation_prompts,
        *(clip.caption for clip in clips),
    ]
    if accelerator.is_main_process:
        encode_prompts(
            prompts, encodings, load=lambda: load_text_encoder(plan), tokens=plan.spec.text_tokens,
            device=plan.device, report=report, check=check,
        )  # fmt: skip
        free_memory()
    holder = _LazyVae(plan)
    vae_key = f"{parts['vae']} {plan.dtype} tiled {plan.config.enable_tiling}"
    mine = range(accelerator.process_index, len(clips), accelerator.num_processes)
    outcomes: list[list[Section] | LeftOut] = []
    for done, index in enumerate(mine):
        check()
        clip = clips[index]
        outcomes.append(
            encode_clip(
                clip, plan.sampling, cache, vae=holder, vae_key=vae_key, images=plan.is_i2v, check=check
            )
        )
        report(f"progress: encoding clips {done + 1}/{len(mine)}")
    outcomes = _in_order(gather(outcomes, accelerator))
    sections = [section for outcome in outcomes if isinstance(outcome, list) for section in outcome]
    unusable = [outcome for outcome in outcomes if isinstance(outcome, LeftOut)]
    tell_left_out(unusable, report)
    left_out = [*left_out, *unusable]
    tell_other_lengths(plan, sections, report)
    check_left_out(plan.config, left_out, usable=len(sections))
    if accelerator.is_main_process:
        samples = {path for section in sections for side in section.files for path in side}
        cache.trim(samples | {encodings.prompt_path(text) for text in prompts})
    vae = holder() if plan.is_i2v else None
    scaling_factor = _scaling_factor(plan)
    if vae is not None:
        del vae.decoder
    del holder
    free_memory()
    return Data(
        sections=sections, left_out=left_out, encodings=encodings, vae=vae, scaling_factor=scaling_factor
    )


def check_left_out(config: TrainingConfig, left_out: list[LeftOut], *, usable: int) -> None:
    """Raise UserError when nothing is left, or what is left out is reason to stop."""
    listed = "\n".join(f"  {each.name}: {each.reason}" for each in left_out)
    if not usable:
        raise UserError(f"no clip can be used:\n{listed}")
    if left_out and config.on_bad_clip == "stop":
        raise UserError(f"{len(left_out)} clips cannot be used, and on_bad_clip is stop:\n{listed}")


def tell_other_lengths(plan: Plan, sections: list[Section], report: Report) -> None:
    """A base with learned positions has them for its own length only; for others diffusers computes some."""
    others = sorted({section.frames for section in sections} - {plan.spec.frames})
    if others and plan.spec.size_rule == "fixed":
        report(
            f"samples of {', '.join(map(str, others))} frames: {plan.spec.name} learned its positions for "
            f"{plan.spec.frames} and gets computed ones here, as in predictions of those lengths; for "
            f"predictions of {plan.spec.frames} frames train on clips that are long enough"
        )


def tell_left_out(left_out: list[LeftOut], report: Report) -> None:
    for each in left_out:
        report(f"left out: {each.name}: {each.reason}")


def load_text_encoder(plan: Plan) -> tuple[Any, Any]:
    """Tokenizer and T5 encoder of the base, on the device in the base's type."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(plan.folder / "tokenizer", local_files_only=True)
    encoder = T5EncoderModel.from_pretrained(
        plan.folder / "text_encoder",
        dtype=getattr(torch, plan.dtype),
        local_files_only=True,
        use_safetensors=True,
    )
    return tokenizer, encoder.to(plan.device).eval().requires_grad_(False)


class _LazyVae:
    """Loads the VAE when it is first needed: with a full cache, text to video never does."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.vae: AutoencoderKLCogVideoX | None = None

    def __call__(self) -> "AutoencoderKLCogVideoX":
        if self.vae is None:
            from diffusers import AutoencoderKLCogVideoX

            self.vae = AutoencoderKLCogVideoX.from_pretrained(
                self.plan.folder / "vae",
                dtype=getattr(torch, self.plan.dtype),
                local_files_only=True,
                use_safetensors=True,
            )
            self.vae.to(self.plan.device).eval().requires_grad_(False)
            if self.plan.config.enable_tiling:
                self.vae.enable_tiling()
        return self.vae


def _scaling_factor(plan: Plan) -> float:
    from lib.models.derive import read_config

    return read_config(plan.folder / "vae" / "config.json", "scaling_factor")["scaling_factor"]


def gather(mine: list, accelerator: "Accelerator") -> list[list]:
    """What every process has, by process, in every process."""
    if accelerator.num_processes == 1:
        return [mine]
    from accelerate.utils import gather_object

    flat = gather_object([(accelerator.process_index, place, item) for place, item in enumerate(mine)])
    shares: list[list] = [[] for _ in range(accelerator.num_processes)]
    for process, _, item in sorted(flat, key=lambda entry: entry[:2]):
        shares[process].append(item)
    return shares


def _in_order(shares: list[list]) -> list:
    """One list again of what was dealt out in turn."""
    longest = max(len(share) for share in shares)
    return [share[place] for place in range(longest) for share in shares if place < len(share)]
