"""Prompts to token numbers, as transformers' T5Tokenizer, without importing it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as Backend

COMPLETE = "tokenizers"
"""What tokenizer_config.json calls the backend whose tokenizer.json needs nothing beside it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    input_ids: "list[int] | list[list[int]] | torch.Tensor"
    """For one text, for several, or [texts, tokens]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A tokenizer.json with the part of transformers' interface that the pipelines use."""

    backend: "Backend"
    padding_id: int

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The tokenizer in a checkpoint's `tokenizer`; None where only transformers can read it."""
        config = folder / "tokenizer_config.json"
        document = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if document.get("backend") != COMPLETE or not (folder / "tokenizer.json").is_file():
            return None
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.no_padding()
        backend.no_truncation()
        padding_id = backend.token_to_id(document.get("pad_token", "<pad>"))
        return None if padding_id is None else cls(backend=backend, padding_id=padding_id)

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: Literal[False, "longest", "max_length"] = False,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        return_tensors: Literal["pt"] | None = None,
    ) -> Tokens:
        """Token numbers, the closing one included. Truncation keeps that; padding goes behind."""
        texts = [text] if isinstance(text, str) else text
        rows = [self.backend.encode(each, add_special_tokens=add_special_tokens).ids for each in texts]
        if truncation and max_length is not None:
            closing = int(add_special_tokens)
            rows = [
                row[: max_length - closing] + row[len(row) - closing :] if len(row) > max_length else row
                for row in rows
            ]
        if padding:
            length = max_length if padding == "max_length" else max(map(len, rows))
            rows = [row + [self.padding_id] * (length - len(row)) for row in rows]
        if return_tensors is None:
            return Tokens(rows[0] if isinstance(text, str) else rows)
        import torch

        return Tokens(torch.tensor(rows))

    def batch_decode(self, rows: Any) -> list[str]:
        """The texts of rows of token numbers."""
        return self.backend.decode_batch(
            [[int(token) for token in row] for row in rows], skip_special_tokens=False
        )
