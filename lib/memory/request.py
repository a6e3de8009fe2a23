"""What a request asks of memory, from the request and the LoRAs that are on the transformer."""

from typing import TYPE_CHECKING

from lib.memory.stages import Adapted, Clip

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

    from lib.generation.request import Request


def clip_of(request: "Request", transformer: "CogVideoXTransformer3DModel | None" = None) -> Clip:
    """The request's clip; with a transformer, beside the LoRAs that are attached to it."""
    return Clip(
        width=request.width,
        height=request.height,
        frames=request.num_frames,
        guided=request.guidance_scale > 1,
        adapted=_adapted(_lora_weights(transformer)),
    )


def lora_bytes(transformer: "CogVideoXTransformer3DModel") -> int:
    """Of all LoRAs that are attached, in use or not."""
    return sum(_lora_weights(transformer).values())


def _lora_weights(transformer: "CogVideoXTransformer3DModel | None") -> dict[str, int]:
    if not getattr(transformer, "peft_config", None):
        return {}
    return {name: weight.nbytes for name, weight in transformer.named_parameters() if ".lora_" in name}


def _adapted(names: dict[str, int]) -> Adapted:
    if not names:
        return "none"
    return "everything" if any(".ff." in name for name in names) else "attention"
