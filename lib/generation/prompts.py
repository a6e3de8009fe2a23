"""Encode prompts, with a cache of T5 embeddings: the most recent ones, and always the empty prompt's."""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline

from lib.models.specs import ModelSpec
from lib.progress import Report, print_line
from lib.text_limits import READ

Embeddings = tuple[torch.Tensor, torch.Tensor | None]
"""Embeddings of prompt and negative prompt, [1, tokens, width] each."""
KEPT = 32
"""Embeddings of T5-XXL are 1.9 MB each in 16 bits."""


@dataclass(kw_only=True, slots=True)
class PromptEncoder:
    """The text encoder of one pipeline, with a cache. Not thread-safe."""

    spec: ModelSpec
    pipeline: DiffusionPipeline
    report: Report = print_line
    _kept: OrderedDict[str, torch.Tensor] = field(default_factory=OrderedDict)
    """The least recently used first."""

    def encode(self, prompt: str, negative_prompt: str | None) -> Embeddings:
        """Return both embeddings on the pipeline's device; `negative_prompt` is None without guidance.

        Reports a prompt that is longer than the model reads.
        """
        prompt = prompt[:READ]
        tokens = len(self.pipeline.tokenizer(prompt).input_ids)
        if tokens > self.spec.text_tokens:
            self.report(
                f"The prompt has {tokens} tokens; {self.spec.name} reads the first {self.spec.text_tokens}."
            )
        return self._embedding(prompt), None if negative_prompt is None else self._embedding(negative_prompt)

    def _embedding(self, text: str) -> torch.Tensor:
        if text not in self._kept:
            # One text at a time, as the pipeline itself does: a batch would change the last bits.
            embedding, _ = self.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=self.spec.text_tokens
            )
            while len(self._kept) >= KEPT:
                # The empty prompt stays: any request may need it.
                del self._kept[next((kept for kept in self._kept if kept), "")]
            self._kept[text] = embedding
        self._kept.move_to_end(text)
        return self._kept[text]
