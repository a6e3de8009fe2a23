"""A request: what a caller asks for, settled and checked at the door against a ModelSpec."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lib.errors import UserError
from lib.generation.step_cache import Speed, check_speed
from lib.lora.source import Address, Choice, parse_choices
from lib.models.specs import ModelSpec

if TYPE_CHECKING:
    from PIL import Image

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to generate; every field settled and checked against a ModelSpec by `build_request`."""

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
    image: "Image.Image | None" = None
    """First frame, already of width x height; image-to-video only."""
    image_fit: Literal["crop", "pad", "stretch"] | None = None
    """How it was brought to that size."""
    loras: tuple[Choice, ...] = ()

    def settings(self) -> dict[str, str]:
        """Everything but the prompts and the image, for the file's metadata."""
        names = (
            "num_inference_steps guidance_scale num_frames width height fps seed use_dynamic_cfg scheduler "
            "speed"
        )
        settings = {name: str(getattr(self, name)) for name in names.split()}
        return settings | ({"image_fit": self.image_fit} if self.image_fit else {})


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
    image: "Image.Image | None" = None,
    image_fit: Literal["crop", "pad", "stretch"] = "crop",
    any_size: bool = False,
    lora_weights: str = "",
    lora_scale: float = 1.0,
    lora_alpha: float | None = None,
    extra_lora: str = "",
    extra_lora_scale: float = 1.0,
    extra_lora_alpha: float | None = None,
    default_lora: Address | None = None,
) -> Request:
    """Fill what is empty from the spec and check the rest; image is of any size and is fitted here.

    `default_lora` is used where lora_weights is empty. Raises UserError naming what was given, what is
    allowed and the nearest valid value.
    """
    loras = parse_choices(
        lora_weights=lora_weights,
        lora_scale=lora_scale,
        lora_alpha=lora_alpha,
        extra_lora=extra_lora,
        extra_lora_scale=extra_lora_scale,
        extra_lora_alpha=extra_lora_alpha,
        default=default_lora,
    )
    num_inference_steps = int(num_inference_steps)
    num_frames, width, height, fps, seed = map(_whole, (num_frames, width, height, fps, seed))
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
        raise UserError(f"seed={seed} is out of range: 0 to {MAX_SEED}. The nearest is {nearest}.")
    if image is not None:
        from lib.video.images import fit_image

        image = fit_image(image, width, height, image_fit)
    return Request(
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
        speed=check_speed(speed),
        image=image,
        image_fit=image_fit if image is not None else None,
        loras=tuple(loras),
    )


def _whole(value: int | float | None) -> int | None:
    """JSON has one kind of number: Cog lets 9.0 through where it asks for an integer."""
    return None if value is None else int(value)
