"""The painter: a text-to-image pipeline of diffusers that makes the first frame of each scene."""

import inspect
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.pipelines.library_logs import silence_libraries
from lib.video.images import fit_image

DISTILLED_STEPS = 4
"""What FLUX.2-klein and FLUX.1-schnell were distilled for."""
MAX_TEXT_TOKENS = 512
SIZE_STEP = 16
"""Sides are painted in multiples of it, which every usual image model supports."""


@dataclass(kw_only=True, slots=True)
class Painter:
    """A loaded text-to-image pipeline. Not thread-safe."""

    pipeline: Any

    @classmethod
    def load(cls, folder: Path, *, device: str, dtype: torch.dtype) -> Self:
        """Load a diffusers folder. Raises UserError for a pipeline that does not paint from a text."""
        silence_libraries()
        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
        accepted = inspect.signature(pipeline.__call__).parameters
        if missing := [name for name in ("prompt", "width", "height") if name not in accepted]:
            raise UserError(
                f"{folder.name} holds a {type(pipeline).__name__}, which takes no {missing[0]}; choose a "
                "text-to-image model with COGVIDEOX_PAINTER."
            )
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline=pipeline.to(device))

    def paint(
        self,
        prompt: str,
        *,
        width: int,
        height: int,
        seed: int,
        stop: threading.Event | None = None,
    ) -> Image.Image:
        """Return a picture of exactly width x height; the same seed gives the same one.

        Raises Stopped within a step once `stop` is set.
        """

        def check(_pipeline: object, _step: int, _timestep: object, values: dict) -> dict:
            check_stop(stop)
            return values

        check_stop(stop)
        output = self.pipeline(
            prompt=prompt,
            width=_round_up(width),
            height=_round_up(height),
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=check,
            **self._options(),
        )
        return fit_image(output.images[0].convert("RGB"), width, height, "crop")

    def _options(self) -> dict[str, Any]:
        """Return the options in which models differ; for all others the pipeline's own defaults are used."""
        accepted = inspect.signature(self.pipeline.__call__).parameters
        options: dict[str, Any] = {}
        transformer: Any = getattr(self.pipeline, "transformer", None)
        if self.pipeline.config.get("is_distilled"):  # FLUX.2-klein
            options |= {"num_inference_steps": DISTILLED_STEPS, "guidance_scale": 1.0}
        elif type(self.pipeline).__name__ == "FluxPipeline" and not transformer.config.guidance_embeds:
            options |= {"num_inference_steps": DISTILLED_STEPS, "guidance_scale": 0.0}  # FLUX.1-schnell
        if "text_encoder_out_layers" in accepted:
            layers = self.pipeline.text_encoder.config.num_hidden_layers
            options["text_encoder_out_layers"] = tuple(layers * quarter // 4 for quarter in (1, 2, 3))
        if "text_encoder_out_layers" in accepted and "max_sequence_length" in accepted:
            options["max_sequence_length"] = min(MAX_TEXT_TOKENS, self.pipeline.tokenizer.model_max_length)
        return options


def _round_up(side: int) -> int:
    return -(-side // SIZE_STEP) * SIZE_STEP
