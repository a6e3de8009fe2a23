"""Every environment variable that the service reads: its type, its default, and what it means.

    settings = current()
    settings.model            # "" for the embedded model
    settings.local_sources    # bool

`python -m lib.settings` prints the table of docs/models.md.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from lib.errors import UserError

Attention = Literal["auto", "native", "cudnn", "flash", "flash3", "sage"]
Dtype = Literal["float32", "float16", "bfloat16"]
Offload = Literal["resident", "text", "model", "group", "sequential"]
Quantization = Literal["none", "int8", "int8-dynamic", "fp8", "fp8-dynamic", "int4"]

QUANTIZATION_ALIASES = {"8bit": "int8", "4bit": "int4"}
"""Earlier spellings, which are still accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The variables of one process, checked. A field is None where the service chooses by itself."""

    model: str
    """Name, folder or Hub repository; empty for the embedded model."""
    writer: str
    """The language model of stories, named like `model`; empty for the default."""
    painter: str
    """Their image model."""
    offload: Offload | None
    parallel: str
    """A number of processes, a layout or "off"; empty for all GPUs. lib/distributed/layout.py parses it."""
    attention: Attention
    compile: bool
    quantization: Quantization | None
    dtype: Dtype | None
    any_size: bool
    cache: Path
    local_sources: bool
    lora_cache_bytes: int
    latents_bytes: int
    prepare_seconds: float
    """How long a request may take before and after the model's work."""
    default_lora: str
    """A LoRA for every request that names none; empty for none."""
    hub_endpoint: str
    api_token: str
    """What callers of a local server must send as a bearer token; empty for none."""
    api_hosts: frozenset[str]
    """Lower-case names under which callers reach a local server, besides its own."""
    hub_repositories: frozenset[str]
    """Lower-case names of repositories, and owner/*, that requests may read with the operator's token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """A row of the table in docs/models.md."""

    name: str
    meaning: str
    default: str = ""


VARIABLES = (
    Variable(
        name="COGVIDEOX_MODEL",
        meaning="a name above, a folder, or a Hub repository",
        default="the embedded model",
    ),
    Variable(
        name="COGVIDEOX_WRITER",
        meaning="the language model of [stories](story.md): a name, a folder, or a Hub repository of any "
        "instruct model of transformers",
        default="`tiny-writer` next to an embedded model, else `qwen3-4b-instruct`",
    ),
    Variable(
        name="COGVIDEOX_PAINTER",
        meaning="their image model: a name, a folder, or a Hub repository of any text-to-image pipeline of "
        "diffusers",
        default="`tiny-painter` next to an embedded model, else `flux.2-klein-4b`",
    ),
    Variable(
        name="COGVIDEOX_OFFLOAD",
        meaning="force the [plan](memory.md#plans) `resident`, `text`, `model`, `group` or `sequential`; "
        "on a CPU only `resident`",
        default="chosen from free memory",
    ),
    Variable(
        name="COGVIDEOX_PARALLEL",
        meaning="how many GPUs [share a clip](parallel.md), or in which layout; `off`",
        default="all",
    ),
    Variable(
        name="COGVIDEOX_ATTENTION",
        meaning="the [attention backend](acceleration.md#attention): "
        + ", ".join(f"`{name}`" for name in get_args(Attention)),
        default="`auto`: the fastest exact one present",
    ),
    Variable(
        name="COGVIDEOX_COMPILE",
        meaning="`1`: [compile](acceleration.md#compiling) the transformer's blocks; the first start takes "
        "longer",
        default="`0`",
    ),
    Variable(
        name="COGVIDEOX_QUANTIZATION",
        meaning="how weights are stored: `none`, `int8`, `int8-dynamic`, `fp8`, `fp8-dynamic` for "
        "[video](acceleration.md#smaller-weights), `none`, `int8`, `int4` for [captions](captions.md#memory)",
        default="`none`; for captions chosen from free memory",
    ),
    Variable(
        name="COGVIDEOX_DTYPE",
        meaning="captions: `bfloat16`, `float16`, `float32`",
        default="chosen from the machine",
    ),
    Variable(
        name="COGVIDEOX_ANY_SIZE",
        meaning="`1`: untrained sizes in multiples of 16, on 2B, 5B and 1.5 text-to-video",
        default="refused",
    ),
    Variable(name="COGVIDEOX_CACHE", meaning="where downloads are kept", default="`~/.cache/cogvideox`"),
    Variable(
        name="COGVIDEOX_LOCAL_SOURCES",
        meaning="`1`: requests may name the server's own files, `http://` and private addresses",
        default="refused; `script/predict` sets it for the server that it starts",
    ),
    Variable(
        name="COGVIDEOX_API_TOKEN",
        meaning="a secret that callers of [`script/serve`](serving.md#who-may-call) must send; "
        "`script/predict --url` sends it",
        default="none; needed for `--host` beyond this machine",
    ),
    Variable(
        name="COGVIDEOX_API_HOSTS",
        meaning="host names under which callers reach `script/serve`, such as a proxy's, separated by commas",
        default="this machine's",
    ),
    Variable(
        name="COGVIDEOX_LORA_CACHE_GB",
        meaning="how much of the cache folder [downloaded LoRAs](lora.md#cache) may take",
        default="20",
    ),
    Variable(
        name="COGVIDEOX_LATENTS_GB",
        meaning="how much of it [encoded training data](training.md#memory-and-time) may take",
        default="200",
    ),
    Variable(
        name="COGVIDEOX_PREPARE_SECONDS",
        meaning="how long a request may take before and after the model's work: downloading, unpacking, "
        "converting, writing",
        default="1800",
    ),
    Variable(
        name="COG_WEIGHTS",
        meaning="the LoRA of every request that [names none](lora.md#a-server-for-one-lora)",
    ),
    Variable(
        name="COGVIDEOX_TORCH",
        meaning="`cpu`: `script/setup` installs torch without CUDA",
        default="PyPI's torch",
    ),
    Variable(
        name="HF_TOKEN",
        meaning="for private and gated repositories that variables name; for those that requests name see "
        "the next line",
    ),
    Variable(
        name="COGVIDEOX_HUB_REPOSITORIES",
        meaning="repositories that requests may read with `HF_TOKEN`: `owner/name` or `owner/*`, separated "
        "by commas",
        default="none; all with `COGVIDEOX_LOCAL_SOURCES=1`",
    ),
    Variable(name="HF_ENDPOINT", meaning="another Hub, such as a mirror", default="`https://huggingface.co`"),
    Variable(name="HF_HUB_OFFLINE", meaning="`1`: download nothing"),
)


def current(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the variables of this process. Raises UserError naming the variable and what it may be."""
    env = os.environ if environment is None else environment
    quantization = _choice(env, "COGVIDEOX_QUANTIZATION", get_args(Quantization), QUANTIZATION_ALIASES)
    return Settings(
        model=env.get("COGVIDEOX_MODEL", ""),
        writer=env.get("COGVIDEOX_WRITER", ""),
        painter=env.get("COGVIDEOX_PAINTER", ""),
        offload=cast("Offload | None", _choice(env, "COGVIDEOX_OFFLOAD", get_args(Offload))),
        parallel=env.get("COGVIDEOX_PARALLEL", "").strip().lower(),
        attention=cast("Attention", _choice(env, "COGVIDEOX_ATTENTION", get_args(Attention)) or "auto"),
        compile=_flag(env, "COGVIDEOX_COMPILE"),
        quantization=cast("Quantization | None", quantization),
        dtype=cast("Dtype | None", _choice(env, "COGVIDEOX_DTYPE", get_args(Dtype))),
        any_size=_flag(env, "COGVIDEOX_ANY_SIZE"),
        cache=Path(env.get("COGVIDEOX_CACHE") or "~/.cache/cogvideox").expanduser(),
        local_sources=_flag(env, "COGVIDEOX_LOCAL_SOURCES"),
        lora_cache_bytes=_gigabytes(env, "COGVIDEOX_LORA_CACHE_GB", 20),
        latents_bytes=_gigabytes(env, "COGVIDEOX_LATENTS_GB", 200),
        prepare_seconds=_seconds(env, "COGVIDEOX_PREPARE_SECONDS", 1800),
        default_lora=env.get("COG_WEIGHTS", ""),
        hub_endpoint=(env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
        api_token=_token(env, "COGVIDEOX_API_TOKEN"),
        api_hosts=_names(env, "COGVIDEOX_API_HOSTS"),
        hub_repositories=_names(env, "COGVIDEOX_HUB_REPOSITORIES"),
    )


def markdown() -> str:
    """Return the table of all variables."""
    rows = [f"| `{each.name}` | {each.meaning} | {each.default} |" for each in VARIABLES]
    return "\n".join(["| variable | meaning | default |", "|---|---|---|", *rows])


def _choice(
    env: Mapping[str, str], name: str, allowed: tuple[str, ...], aliases: Mapping[str, str] | None = None
) -> str | None:
    """Return one of `allowed`, None where the variable is empty."""
    value = env.get(name, "")
    value = (aliases or {}).get(value, value)
    if value and value not in allowed:
        raise UserError(f"{name}={value} is unknown; allowed are {', '.join(allowed)}.")
    return value or None


def _flag(env: Mapping[str, str], name: str) -> bool:
    return _choice(env, name, ("0", "1")) == "1"


def _names(env: Mapping[str, str], name: str) -> frozenset[str]:
    """Return the names in a list separated by commas, in lower case."""
    return frozenset(each.strip().lower() for each in env.get(name, "").split(",") if each.strip())


def _token(env: Mapping[str, str], name: str) -> str:
    """Return a secret that can be sent in a header. The message does not show it."""
    value = env.get(name, "").strip()
    if not value.isascii() or not value.isprintable() or " " in value:
        raise UserError(f"{name} has characters that a header cannot hold; use letters, digits and -._~+/=.")
    return value


def _gigabytes(env: Mapping[str, str], name: str, default: int) -> int:
    """Return a size in bytes; the variable is in GB (10^9 bytes)."""
    return int(_positive(env, name, default, "a size in GB") * 1e9)


def _seconds(env: Mapping[str, str], name: str, default: int) -> float:
    return _positive(env, name, default, "a number of seconds")


def _positive(env: Mapping[str, str], name: str, default: int, what: str) -> float:
    text = env.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{name}={text} is not {what} above 0; empty means {default}.")
    return number


if __name__ == "__main__":
    print(markdown())
