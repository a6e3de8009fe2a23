"""Prompts to embeddings, none of them twice: the last ones are kept, and with them the empty one."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lib.models.specs import ModelSpec

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

KEPT = 32
"""Embeddings of T5-XXL are 1.9 MB each in 16 bits."""


@dataclass(kw_only=True, slots=True)
class PromptEncoder:
    """The text encoder of one pipeline and what it has made. Not for several threads at once."""

    spec: ModelSpec
    pipeline: "DiffusionPipeline"
    report: Callable[[str], None] = print
    _kept: "OrderedDict[str, torch.Tensor]" = field(default_factory=OrderedDict)
    """The least recently used first."""

    def encode(self, prompt: str, negative_prompt: str | None) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Embeddings of both, [1, text tokens, width] each, on the pipeline's device.

        `negative_prompt` is None where guidance needs none. Reports a prompt that is too long to be read
        whole.
        """
        tokens = len(self.pipeline.tokenizer(prompt).input_ids)
        if tokens > self.spec.text_tokens:
            self.report(
                f"The prompt has {tokens} tokens; {self.spec.name} reads the first {self.spec.text_tokens}."
            )
        return self._embedding(prompt), None if negative_prompt is None else self._embedding(negative_prompt)

    def _embedding(self, text: str) -> "torch.Tensor":
        if text not in self._kept:
            # One text at a time, as the pipeline itself does: in a batch the bits would be others.
            embedding, _ = self.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=self.spec.text_tokens
            )
            while len(self._kept) >= KEPT:
                oldest = next(
                    (kept for kept in self._kept if kept), ""
                )  # every request may need the empty one
                del self._kept[oldest]
            self._kept[text] = embedding
        self._kept.move_to_end(text)
        return self._kept[text]
