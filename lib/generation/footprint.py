"""What a request takes of memory: its clip, and the LoRAs that are attached to the transformer."""

from diffusers import CogVideoXTransformer3DModel

from lib.generation.request import Request
from lib.memory.stages import Adapted, Clip


def clip_of(request: Request, transformer: CogVideoXTransformer3DModel) -> Clip:
    """Return the request's clip as the memory model takes it, with the LoRAs attached now."""
    return Clip(
        width=request.width,
        height=request.height,
        frames=request.num_frames,
        guided=request.guided,
        adapted=_adapted_layers(_lora_weights(transformer)),
    )


def lora_bytes(transformer: CogVideoXTransformer3DModel) -> int:
    """Return the bytes of all attached LoRAs, in use or not."""
    return sum(_lora_weights(transformer).values())


def _lora_weights(transformer: CogVideoXTransformer3DModel) -> dict[str, int]:
    if not getattr(transformer, "peft_config", None):
        return {}
    return {name: weight.nbytes for name, weight in transformer.named_parameters() if ".lora_" in name}


def _adapted_layers(names: dict[str, int]) -> Adapted:
    if not names:
        return "none"
    return "everything" if any(".ff." in name for name in names) else "attention"
