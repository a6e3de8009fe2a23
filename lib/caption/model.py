"""CogVLM2-Caption: a vision tower, a language model, and generation from both."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from lib.cancellation import check_stop
from lib.caption.config import CaptionConfig
from lib.caption.inputs import VISION, Prompt, pad_left
from lib.caption.language import build_language_model
from lib.caption.vision import VisionTower

FRAMES_AT_ONCE = 24
"""How many frames pass through the vision tower together: one clip, whatever the batch size."""
MIN_TEMPERATURE = 1e-4
"""Lowest temperature: logits would overflow below it, and sampling is practically greedy."""


class _Watch(StoppingCriteria):
    """Counts generated tokens, and raises Stopped between two of them."""

    def __init__(self, on_token: Callable[[int], None] | None, stop: threading.Event | None) -> None:
        self.on_token, self.stop, self.count = on_token, stop, 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: Any) -> Any:
        check_stop(self.stop)
        self.count += 1
        if self.on_token is not None:
            self.on_token(self.count)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class CaptionModel(nn.Module):
    """The complete model; lib/caption/checkpoint.py loads its weights."""

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
        """The dtype of activations, also where weights are quantized."""
        return self.language.model.norm.weight.dtype

    def see(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the vision tokens [N, tokens, hidden] of pixel values [N, 3, S, S]."""
        parts = frames.split(FRAMES_AT_ONCE)
        return torch.cat([self.vision(part.to(self.device, self.dtype)) for part in parts])

    def embed(self, prompts: list[Prompt], frames: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the language model's inputs for clips of different lengths, padded on the left.

        `frames` has each clip's pixel values [T, 3, S, S]. The result has inputs_embeds [B, L, hidden],
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
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_token: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> list[list[int]]:
        """Generate each clip's new tokens, without the end token.

        Greedy at temperature 0; above it, tokens are sampled with torch's global generator. `on_token` gets
        the number of tokens after each step. Raises Stopped between two tokens.
        """
        inputs = self.embed(prompts, frames)
        check_stop(stop)
        sampling = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature > 0:  # transformers refuses integers
            warmth = float(max(temperature, MIN_TEMPERATURE))
            sampling = {"do_sample": True, "temperature": warmth, "top_p": float(top_p)}
        # transformers types `self` as a protocol with attributes that only other models have.
        generate = self.language.generate  # pyright: ignore[reportAttributeAccessIssue]
        tokens = generate(
            **inputs,
            **sampling,
            top_k=None,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.config.pad_token_id,
            eos_token_id=list(self.config.eos_token_ids),
            stopping_criteria=StoppingCriteriaList([_Watch(on_token, stop)]),
        )
        return [_until_end(row, self.config.eos_token_ids) for row in tokens.tolist()]


def _until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:first]
