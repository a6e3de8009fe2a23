"""CogVLM2-Caption: a vision tower in front of a language model, and generation from both."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import StoppingCriteriaList

from lib.cancellation import check_stop
from lib.caption.config import CaptionConfig
from lib.caption.language import build_language_model
from lib.caption.prompt import VISION, Prompt, pad_left
from lib.caption.vision import VisionTower

FRAMES_AT_ONCE = 24
"""Through the vision tower: one clip's worth, whatever the batch."""
LOWEST_TEMPERATURE = 1e-4
"""Below it the likeliest token is as good as certain, and logits divided by it leave the range of numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How tokens are chosen: the likeliest at temperature 0, drawn above it."""

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0


class CaptionModel(nn.Module):
    """The released checkpoint's structure; see lib/caption/checkpoint.py for its weights."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.language = build_language_model(config)

    @property
    def device(self) -> torch.device:
        return self.language.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, also where weights are quantised."""
        return self.language.model.norm.weight.dtype

    def see(self, frames: torch.Tensor) -> torch.Tensor:
        """Vision tokens [N, tokens, hidden] of pixel values [N, 3, S, S]."""
        parts = frames.split(FRAMES_AT_ONCE)
        return torch.cat([self.vision(part.to(self.device, self.dtype)) for part in parts])

    def embed(self, prompts: list[Prompt], frames: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the language model takes, with padding at the left, for clips of different lengths.

        `frames` holds per prompt its clip's pixel values [T, 3, S, S]. Returns inputs_embeds [B, L, hidden],
        attention_mask and position_ids [B, L].
        """
        ids, types, positions, mask = (
            tensor.to(self.device) for tensor in pad_left(prompts, self.config.pad_token_id)
        )
        embeds = self.language.get_input_embeddings()(ids)
        seen = self.see(torch.cat(frames))
        embeds = embeds.masked_scatter((types == VISION)[..., None], seen.to(embeds.dtype))
        return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[Prompt],
        frames: list[torch.Tensor],
        decoding: Decoding,
        *,
        on_token: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> list[list[int]]:
        """The new tokens of each clip, without the end token.

        `on_token` hears after each step how many there are. Draws from torch's global generator. Raises
        Stopped between two tokens.
        """
        inputs = self.embed(prompts, frames)
        check_stop(stop)
        done = 0

        def watch(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            nonlocal done
            check_stop(stop)
            done += 1
            if on_token is not None:
                on_token(done)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        chosen = {"do_sample": False, "temperature": None, "top_p": None}
        if decoding.temperature > 0:
            temperature = max(decoding.temperature, LOWEST_TEMPERATURE)
            chosen = {"do_sample": True, "temperature": temperature, "top_p": decoding.top_p}
        tokens = self.language.generate(
            **inputs,
            **chosen,
            top_k=None,
            max_new_tokens=decoding.max_new_tokens,
            pad_token_id=self.config.pad_token_id,
            eos_token_id=list(self.config.eos_token_ids),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [_until_end(row, self.config.eos_token_ids) for row in tokens.tolist()]


def _until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0]] if places else tokens
