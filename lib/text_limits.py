"""How long the texts of a request may be, whichever way they come in.

The predictors give the same numbers as max_length, spelled out because Cog reads them statically.
"""

from lib.errors import UserError

PROMPT = 10_000
"""Characters of a prompt or caption. The models read some 1,500 of them."""
PROMPTS = 100_000
"""Characters of several prompts in one text."""
NAME = 4_000
"""Characters of an address, a repository, a column, a list of modules."""
LORA = 100 << 20
"""Characters of a LoRA, which may be a data URI."""
READ = 100_000
"""Characters of a text that reach a tokenizer: captions in files may have 1 MiB."""

LIMITS = {
    "prompt": PROMPT,
    "idea": PROMPT,
    "negative_prompt": PROMPT,
    "trigger_word": PROMPT,
    "caption_prefix": PROMPT,
    "caption_suffix": PROMPT,
    "lora_weights": LORA,
    "extra_lora": LORA,
    "transformer_url": NAME,
    "vae_url": NAME,
    "lora_url": NAME,
    "overrides": NAME,
    "hub_repository": NAME,
}
"""By input of a prediction. Those of a training are in training/groups.py."""


def check_length(name: str, text: str, longest: int | None = None) -> None:
    """Raise UserError for a text of more than `longest` characters, by default those of LIMITS."""
    longest = LIMITS[name] if longest is None else longest
    if len(text) > longest:
        raise UserError(f"{name} has {len(text):,} characters; at most {longest:,} are allowed.")
