"""How a clip and a question become token ids, their types and their positions.

Ids are those of the original: the start token, for every frame as many padding tokens as it has vision tokens
(in chat followed by the frame's number), then the text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Template = Literal["chat", "base", "vqa"]
TEMPLATES: dict[Template, str] = {
    "chat": "Question: {} Answer:",
    "base": "{}",
    "vqa": "Question: {} Short answer:",
}
LANGUAGE, VISION = 0, 1
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """One clip's prompt; int64 tensors [L]."""

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    """0 language, 1 vision."""
    position_ids: torch.Tensor


def build_prompt(
    question: str, *, frames: int, template: Template, tokens_per_frame: int, bos: int, pad: int,
    encode: Encode,
) -> Prompt:  # fmt: skip
    """The prompt for a clip of that many frames. `encode` gives a text's ids without special tokens."""
    ids, types = [bos], [LANGUAGE]
    for number in range(frames):
        ids += [pad] * tokens_per_frame
        types += [VISION] * tokens_per_frame
        if template == "chat":
            digits = encode(str(number))
            ids += digits
            types += [LANGUAGE] * len(digits)
    text = encode(TEMPLATES[template].format(question))
    ids += text
    types += [LANGUAGE] * len(text)
    return Prompt(
        input_ids=torch.tensor(ids),
        token_type_ids=torch.tensor(types),
        position_ids=build_position_ids(torch.tensor(types)),
    )


def build_position_ids(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Positions [L] for types [L].

    The first and the last token of each run of vision tokens count as language. From 0 on, every language
    token is one further, and so is the first vision token after one; all other vision tokens share its
    position. Without a language token between them frames are one run: in base, all patches of a clip.
    """
    vision = token_type_ids == VISION
    before = torch.roll(vision, 1)
    before[0] = False
    after = torch.roll(vision, -1)
    after[-1] = False
    inner = vision & before & after
    follows_inner = torch.roll(inner, 1)
    follows_inner[0] = False
    step = ~inner | ~follows_inner
    step[0] = False
    return step.cumsum(0)


def pad_left(prompts: list[Prompt], pad: int) -> tuple[torch.Tensor, ...]:
    """Ids, types, positions and attention mask [B, L] of prompts of different lengths, filled at the left."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    types, positions, mask = (torch.zeros_like(ids) for _ in range(3))
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        ids[row, start:], types[row, start:] = prompt.input_ids, prompt.token_type_ids
        positions[row, start:], mask[row, start:] = prompt.position_ids, 1
    return ids, types, positions, mask
