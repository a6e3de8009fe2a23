"""A request: what a caller asks for, validated against a ModelSpec."""

import os
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from lib.errors import UserError
from lib.generation.step_schedule import Speed, check_speed, steps_to_forecast
from lib.memory.plan import MemoryPlan
from lib.memory.stages import Adapted, Clip
from lib.models.specs import ModelSpec
from lib.text_limits import check_length
from lib.video.images import fit_image

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to generate; `build_request` validates and completes every field."""

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    num_frames: int
    width: int
    height: int
    fps: int
    seed: int
    use_dynamic_cfg: bool
    scheduler: Literal["default", "ddim", "dpm"]
    speed: Speed = "exact"
    forecast_steps: tuple[int, ...] = ()
    """Steps that are forecast instead of computed, counted from 0."""
    image: Image.Image | None = None
    """First frame, already of width x height; image-to-video only."""
    image_fit: Literal["crop", "pad", "stretch"] | None = None
    """How it was fitted to that size."""

    @property
    def computed_steps(self) -> int:
        return self.num_inference_steps - len(self.forecast_steps)

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is used: a guidance scale of 1 turns guidance off."""
        return self.guidance_scale > 1

    def clip(self, *, adapted: Adapted = "none") -> Clip:
        """Return the properties that determine its memory; `adapted` says which layers have LoRAs."""
        return Clip(
            width=self.width, height=self.height, frames=self.num_frames, guided=self.guided, adapted=adapted
        )

    def metadata(self) -> dict[str, str]:
        """Return what repeats the clip, except the image and LoRAs, for the file's metadata."""
        names = (
            "prompt negative_prompt num_inference_steps guidance_scale num_frames width height fps seed "
            "use_dynamic_cfg scheduler speed"
        )
        metadata = {name: str(getattr(self, name)) for name in names.split()}
        return metadata | ({"image_fit": self.image_fit} if self.image_fit else {})


def build_request(
    spec: ModelSpec,
    *,
    prompt: str,
    negative_prompt: str,
    num_inference_steps: int,
    guidance_scale: float,
    num_frames: int | None,
    width: int | None,
    height: int | None,
    fps: int | None,
    seed: int | None,
    use_dynamic_cfg: bool,
    scheduler: Literal["default", "ddim", "dpm"],
    speed: Speed = "exact",
    image: Image.Image | None = None,
    image_fit: Literal["crop", "pad", "stretch"] = "crop",
    any_size: bool = False,
    plan: MemoryPlan | None = None,
) -> Request:
    """Validate inputs and complete empty ones from the spec; an image of any size is fitted.

    `plan` limits what the clip may take of memory. Raises UserError that says what was given, what is allowed
    and the nearest valid value.
    """
    check_length("prompt", prompt)
    check_length("negative_prompt", negative_prompt)
    speed = check_speed(speed)
    num_inference_steps = int(num_inference_steps)
    num_frames, width, height, fps, seed = map(_to_int, (num_frames, width, height, fps, seed))
    num_frames = spec.frames if num_frames is None else num_frames
    spec.check_frames(num_frames)
    if width is None and height is None and image is not None:
        width, height = spec.nearest_size(image.width, image.height)
    width = spec.width if width is None else width
    height = spec.height if height is None else height
    spec.check_size(width, height, any_size=any_size)
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
    if not 0 <= seed <= MAX_SEED:
        nearest = min(max(seed, 0), MAX_SEED)
        raise UserError(f"seed={seed} is out of range: use 0 to {MAX_SEED} (nearest: {nearest}).")
    if image is not None:
        image = fit_image(image, width, height, image_fit)
    request = Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
        width=width,
        height=height,
        fps=spec.fps if fps is None else fps,
        seed=seed,
        use_dynamic_cfg=use_dynamic_cfg,
        scheduler=scheduler,
        speed=speed,
        forecast_steps=steps_to_forecast(spec, speed, num_inference_steps),
        image=image,
        image_fit=image_fit if image is not None else None,
    )
    if plan is not None:
        plan.tiled(request.clip())  # refuses a clip that does not fit
    return request


def _to_int(value: int | float | None) -> int | None:
    """Return an integer: JSON has one kind of number, and Cog accepts 9.0 for an integer input."""
    return None if value is None else int(value)
