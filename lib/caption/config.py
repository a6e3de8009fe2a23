"""The config.json of a CogVLM2-Caption, with the names of the released file."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lib.errors import UserError

ARCHITECTURE = "CogVLMVideoForCausalLM"
"""The released checkpoint's architecture name. The code that it ships is never imported."""
ROPE_BASE = 500_000.0
"""Llama 3's; it is not in the released config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower; sizes are in pixels, and the defaults are those of the released checkpoint."""

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_positions: int = 257
    """The patches of one frame and the class token."""
    in_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    dropout_prob: float = 0.0

    @property
    def grid(self) -> int:
        """Return the number of patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Return the number of tokens for one frame: a quarter of its patches, plus boi and eoi."""
        return (self.grid // 2) ** 2 + 2


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """The complete model; the defaults are those of the released checkpoint."""

    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_multi_query_heads: int = 8
    """Heads of keys and values."""
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    vocab_size: int = 128_256
    max_position_embeddings: int = 8192
    bos_token_id: int = 128_000
    eos_token_id: int | list[int] = 128_001
    pad_token_id: int = 128_002
    tie_word_embeddings: bool = False
    template_version: str = "base"
    initializer_range: float = 0.02
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self) -> None:
        vision = self.vision_config
        expected = {
            "hidden_act": (self.hidden_act, "silu"),
            "vision_config.hidden_act": (vision.hidden_act, "gelu"),
            "tie_word_embeddings": (self.tie_word_embeddings, False),
            "vision_config.in_channels": (vision.in_channels, 3),
            "vision_config.num_positions": (vision.num_positions, vision.grid**2 + 1),
        }
        for name, (given, allowed) in expected.items():
            if given != allowed:
                raise ValueError(f"{name} is {given!r}; this model has {allowed!r}")
        for name, value, divisor in (
            ("hidden_size", self.hidden_size, 2 * self.num_attention_heads),
            ("num_attention_heads", self.num_attention_heads, self.num_multi_query_heads),
            ("vision_config.hidden_size", vision.hidden_size, vision.num_heads),
            ("vision_config.image_size", vision.image_size, 2 * vision.patch_size),
        ):
            if value % divisor:
                raise ValueError(f"{name} is {value}, which is not a multiple of {divisor}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, list) else (self.eos_token_id,)


def read_config(folder: Path) -> CaptionConfig:
    """Read config.json in a model's folder, and end tokens from generation_config.json.

    Raises UserError if the configuration is missing, damaged or another model's.
    """
    content = _json(folder / "config.json")
    if content is None:
        raise UserError(f"{folder} has no config.json; a captioning model is a folder with one.")
    return parse_config(content, _json(folder / "generation_config.json") or {}, place=str(folder))


def parse_config(
    content: dict[str, Any], generation: dict[str, Any] | None = None, *, place: str
) -> CaptionConfig:
    """Parse the content of the two files; see read_config. `place` names the model in errors."""
    if ARCHITECTURE not in (content.get("architectures") or []):
        raise UserError(
            f"{place} is a {', '.join(content.get('architectures') or ['model of unknown kind'])}; "
            f"captioning needs a {ARCHITECTURE}."
        )
    try:
        vision = VisionConfig(**_known(VisionConfig, content["vision_config"]))
        language = _known(CaptionConfig, content)
        language.pop("vision_config")
        config = CaptionConfig(**language, vision_config=vision)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{place}: config.json is not that of a CogVLM2-Caption: {reason}.") from error
    more = (generation or {}).get("eos_token_id")
    ends = [*config.eos_token_ids, *(more if isinstance(more, list) else [more])]
    ends = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    return replace(config, eos_token_id=ends if len(ends) > 1 else ends[0])


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


def _known(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in content.items() if name in names and value is not None}
