"""Parse the inputs that name LoRAs into addresses. Nothing is fetched here.

https://replicate.delivery/.../trained_model.tar          the output of a training
https://example.com/style.safetensors                     any https address
owner/name, owner/name@revision/folder/file.safetensors   the Hugging Face Hub
https://huggingface.co/owner/name/blob/main/x.safetensors one of its pages
data:application/octet-stream;base64,...                  the file itself
/data/style.safetensors                                   this machine, where that is allowed
"""

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from lib.errors import UserError, cut, shown
from lib.network import data_uri, hub
from lib.network.http import without_secrets
from lib.settings import current
from lib.storage.disk import size_text
from lib.text_limits import check_length

Place = Literal["url", "hub", "data", "local"]
REPLICATE_HOSTS = frozenset({"replicate.com", "www.replicate.com"})
REPLICATE_VERSION = re.compile(r"(?:r8\.im/)?[\w.-]+/[\w.-]+:[0-9a-f]{6,64}|r8\.im/.*")
HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
HUB_PAGES = ("blob", "resolve", "tree", "raw")
CIVITAI = re.compile(r"(?:www\.)?civitai\.(?:com|red|green)")
HUB_NAME = re.compile(
    rf"(?P<repository>{hub.REPOSITORY.pattern})(?:@(?P<revision>[^/@\s]+))?(?:/(?P<path>.+))?"
)
FORMS = (
    "an https:// address of a .safetensors file or of a training's tar, a Hugging Face owner/name or "
    "owner/name/file.safetensors, or a data: URI"
)
REPLICATE_HINT = (
    "For a model trained on Replicate give the address of its weights, "
    "https://replicate.delivery/.../trained_model.tar, which is the output of its training."
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# A LoRA of rank 128 on four projections of 5B has 132 M parameters: 0.5 GB in float32.
MAX_FILE_BYTES = 4 * 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a LoRA is."""

    place: Place
    name: str
    """Name in messages: the input without secrets."""
    label: str
    """Name in metrics and the video's metadata: without secrets and paths of this machine."""
    key: str
    """The cache's key, equal for all ways to write the same file."""
    trusted: bool = False
    """Whether the server's owner set it, who may name local paths and http addresses."""
    url: str = ""
    repository: str = ""
    revision: str = "main"
    path: str = ""
    """The file or folder in a repository; empty to choose one."""
    content: bytes = b""
    """Content of a data URI."""
    file: Path = Path()
    """On this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One LoRA of a request."""

    address: Address
    scale: float
    alpha: float | None = None
    """For a file that stores none."""
    slot: str = "lora"
    """lora or extra_lora: the prefix of its inputs and metrics."""


def take_choices(inputs: dict[str, Any], *, default: Address | None = None) -> list[Choice]:
    """Take the LoRAs out of a request's inputs; an empty lora_weights means `default` (COG_WEIGHTS).

    Raises UserError for text that names no LoRA, and for an alpha without a LoRA.
    """
    chosen = []
    for slot, input_name, fallback in (("lora", "lora_weights", default), ("extra_lora", "extra_lora", None)):
        source, scale = inputs.pop(input_name, ""), inputs.pop(f"{slot}_scale", 1.0)
        alpha = inputs.pop(f"{slot}_alpha", None)
        check_length(input_name, source)
        if alpha is not None and not 0 < alpha < math.inf:
            raise UserError(f"{slot}_alpha={alpha:g} is out of range: it has to be above 0.")
        address = parse(source) if source.strip() else fallback
        if address is not None:
            chosen.append(Choice(address=address, scale=scale, alpha=alpha, slot=slot))
        elif alpha is not None:
            raise UserError(f"{slot}_alpha={alpha:g} was given without {input_name}; leave it out.")
    return chosen


def max_bytes() -> int:
    """Return the largest size of a LoRA: MAX_FILE_BYTES, or that of the cache where it is smaller."""
    return min(MAX_FILE_BYTES, current().lora_cache_bytes)


def parse(source: str, *, trusted: bool = False) -> Address:
    """Return the address that `source` means. Raises UserError naming the allowed forms, or the right one."""
    source = source.strip()
    if source.partition("/")[0].lower() in (*HUB_HOSTS, *REPLICATE_HOSTS):  # copied without https://
        source = f"https://{source}"
    if source[:5].lower() == "data:":
        return _data(source, trusted)
    scheme = source.partition("://")[0].lower() if "://" in source else ""
    local = scheme == "file" or source.startswith(("/", "./", "../", "~"))
    if not local and scheme:
        return _url(source, scheme, trusted)
    local_sources = current().local_sources
    if local or os.path.exists(source):
        if trusted or local_sources:
            return _local(source, trusted)
        if local:
            raise UserError(
                f"{shown(source)} is a path on the server, which requests may not name; give {FORMS}."
            )
    if REPLICATE_VERSION.fullmatch(source):
        raise UserError(f"{shown(source)} is a version of a model on Replicate. {REPLICATE_HINT}")
    if (match := HUB_NAME.fullmatch(source)) and ".." not in source:
        return _hub(match["repository"], match["revision"], match["path"], source, trusted)
    here = f"; {Path.cwd()} has no such file either" if local_sources else ""
    raise UserError(f"{shown(source)} does not name a LoRA; give {FORMS}{here}.")


def _data(source: str, trusted: bool) -> Address:
    head, comma, body = source.partition(",")
    if not comma or not head.endswith(";base64"):
        raise UserError("The LoRA's data: URI has to be in base64: data:application/octet-stream;base64,...")
    if len(body) * 3 // 4 > (limit := max_bytes()) + 3:
        raise UserError(
            f"The LoRA's data: URI holds more than the {size_text(limit)} that are allowed; give an https:// "
            "address."
        )
    try:
        _, content = data_uri.decode(source)
    except UserError as error:
        raise UserError("The LoRA's data: URI is damaged: it is not valid base64.") from error
    digest = hashlib.sha256(content).hexdigest()
    label = f"data URI {digest[:12]}"
    return Address(
        place="data",
        name=f"The LoRA of {label}",
        label=label,
        key=f"data:{digest}",
        trusted=trusted,
        content=content,
    )


def _local(source: str, trusted: bool) -> Address:
    path = Path(unquote(source[len("file://") :]) if source.lower().startswith("file://") else source)
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{shown(source)} does not exist on the server; give the absolute path of a LoRA.")
    _refuse_pickle(path.name, name=shown(source))
    status = path.stat()
    return Address(
        place="local",
        name=shown(source),
        label=path.name,
        key=f"local:{path.resolve()}:{status.st_size}:{status.st_mtime_ns}",
        trusted=trusted,
        file=path,
    )


def _url(source: str, scheme: str, trusted: bool) -> Address:
    name = shown(without_secrets(source))
    try:
        parts = urlsplit(source)
        host = (parts.hostname or "").lower()
    except ValueError:
        parts, host = None, ""
    if parts is None or not host or scheme not in ("http", "https"):
        raise UserError(f"{name} does not name a LoRA; give {FORMS}.")
    steps = [unquote(step) for step in parts.path.split("/") if step]
    if host in REPLICATE_HOSTS:
        raise UserError(f"{name} is a page on Replicate, not a file. {REPLICATE_HINT}")
    if CIVITAI.fullmatch(host) and steps[:1] == ["models"]:
        raise UserError(_civitai_page(name, parse_qs(parts.query)))
    ours = f"{scheme}://{parts.netloc}".rstrip("/") == hub.endpoint()
    if (host in HUB_HOSTS or ours) and len(steps) >= 2 and steps[0] not in ("datasets", "spaces", "api"):
        return _hub_page(steps, source, trusted)
    _refuse_pickle(parts.path, name=name)
    url = source.partition("#")[0]
    return Address(
        place="url", name=name, label=cut(without_secrets(url)), key=f"url:{url}", trusted=trusted, url=url
    )


def _civitai_page(name: str, query: dict[str, list[str]]) -> str:
    version = query.get("modelVersionId", [""])[0]
    known = version.isdecimal() and len(version) < 20
    address = f"https://civitai.com/api/download/models/{version if known else '<modelVersionId>'}"
    where = "" if known else ", with the number after modelVersionId= in the address of the version's page"
    return (
        f"{name} is a page on CivitAI, and its number is the model's, not a version's. Give the address of "
        f"the download: {address}{where}."
    )


def _hub_page(steps: list[str], source: str, trusted: bool) -> Address:
    repository, kind, rest = "/".join(steps[:2]), steps[2:3], steps[4:]
    shown_source = without_secrets(source)
    if not hub.REPOSITORY.fullmatch(repository) or ".." in "/".join(steps):
        raise UserError(f"{shown(shown_source)} is not the address of a Hugging Face repository.")
    if not kind:
        return _hub(repository, None, None, shown_source, trusted)
    if steps[-1].endswith(".safetensors") and kind[0] not in HUB_PAGES:
        return _hub(repository, None, "/".join(steps[2:]), shown_source, trusted)
    if kind[0] not in HUB_PAGES or len(steps) < 4:
        raise UserError(
            f"{shown(shown_source)} is not a file of a Hugging Face repository; give {repository} or "
            f"{repository}/file.safetensors."
        )
    return _hub(repository, steps[3], "/".join(rest), shown_source, trusted)


def _hub(repository: str, revision: str | None, path: str | None, source: str, trusted: bool) -> Address:
    name, path = shown(source), (path or "").strip("/")
    _refuse_pickle(path, name=name)
    revision = revision or "main"
    label = repository + (f"@{revision}" if revision != "main" else "") + (f"/{path}" if path else "")
    return Address(
        place="hub",
        name=name,
        label=cut(label),
        # A private file that was downloaded with the operator's token is not for requests without it.
        key=f"hub:{hub.endpoint()}:{repository}@{revision}:{path}"
        + (":token" if trusted or hub.may_use_token(repository) else ""),
        trusted=trusted,
        repository=repository,
        revision=revision,
        path=path,
    )


def _refuse_pickle(path: str, *, name: str) -> None:
    """Raise UserError when a path ends like a pickle's; `name` is what the message calls the file."""
    if path.lower().endswith(PICKLES):
        raise UserError(
            f"{name} is a pickle by its name, and loading one could run any code: give a .safetensors file. "
            "Most repositories hold both. script/export-lora, or the predictor predict_export_lora, converts "
            "a SAT LoRA to one."
        )
