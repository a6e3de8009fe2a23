"""What a caller may write to name a LoRA, and which address each form means; nothing is fetched here.

https://replicate.delivery/.../trained_model.tar          the output of a training
https://example.com/style.safetensors                     any https address
owner/name, owner/name@revision/folder/file.safetensors   the Hugging Face Hub
https://huggingface.co/owner/name/blob/main/x.safetensors one of its pages
data:application/octet-stream;base64,...                  the file itself
/data/style.safetensors                                   this machine, where that is allowed
"""

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from lib.errors import UserError
from lib.lora.file import refuse_pickle
from lib.network import hub
from lib.network.http import shown
from lib.network.urls import local_sources_allowed
from lib.storage.disk import size_text

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
NAMED_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a LoRA is, with one meaning."""

    place: Place
    given: str
    """What was given, as messages may show it: without secrets."""
    label: str
    """As metrics and the video's metadata name it: without secrets and without paths of this machine."""
    key: str
    """What the cache knows it by; equal for what is the same file."""
    trusted: bool = False
    """Set by the server's owner, who may name local paths and http addresses."""
    url: str = ""
    repository: str = ""
    revision: str = "main"
    path: str = ""
    """The file or folder in a repository; empty to choose one."""
    content: bytes = b""
    """Of a data URI."""
    file: Path = Path()
    """On this machine."""


def parse(source: str, *, trusted: bool = False, max_bytes: int) -> Address:
    """Return the address that `source` means. Raises UserError naming the forms, or the right one of them."""
    source = source.strip()
    if source.partition("/")[0].lower() in (*HUB_HOSTS, *REPLICATE_HOSTS):  # as people copy them
        source = f"https://{source}"
    if source.startswith("data:"):
        return _data(source, trusted, max_bytes)
    scheme = source.partition("://")[0].lower() if "://" in source else ""
    local = scheme == "file" or source.startswith(("/", "./", "../", "~"))
    if not local and scheme:
        return _url(source, scheme, trusted)
    if local or os.path.exists(source):
        if trusted or local_sources_allowed():
            return _local(source, trusted)
        if local:
            raise UserError(
                f"{_cut(source)!r} is a path on the server, which requests may not name; give {FORMS}."
            )
    if REPLICATE_VERSION.fullmatch(source):
        raise UserError(f"{_cut(source)!r} is a version of a model on Replicate. {REPLICATE_HINT}")
    if (match := HUB_NAME.fullmatch(source)) and ".." not in source:
        return _hub(match["repository"], match["revision"], match["path"], source, trusted)
    here = f"; there is no such file in {Path.cwd()} either" if local_sources_allowed() else ""
    raise UserError(f"{_cut(source)!r} names no LoRA; give {FORMS}{here}.")


def _cut(text: str) -> str:
    return text[:NAMED_CHARACTERS]


def _data(source: str, trusted: bool, max_bytes: int) -> Address:
    head, comma, body = source.partition(",")
    if not comma or not head.endswith(";base64"):
        raise UserError("The LoRA's data: URI has to be in base64: data:application/octet-stream;base64,...")
    if len(body) * 3 // 4 > max_bytes + 3:
        raise UserError(
            f"The data: URI of the LoRA holds more than the {size_text(max_bytes)} that are allowed; give an "
            "https:// address."
        )
    try:
        content = base64.b64decode(unquote(body) if "%" in body else body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("The data: URI of the LoRA is damaged: it is not valid base64.") from error
    digest = hashlib.sha256(content).hexdigest()
    label = f"data URI {digest[:12]}"
    return Address(
        place="data",
        given=f"The LoRA of {label}",
        label=label,
        key=f"data:{digest}",
        trusted=trusted,
        content=content,
    )


def _local(source: str, trusted: bool) -> Address:
    path = Path(unquote(source[len("file://") :]) if source.lower().startswith("file://") else source)
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{_cut(source)!r} does not exist on the server; give the whole path of a LoRA.")
    refuse_pickle(path.name, name=repr(_cut(source)))
    status = path.stat()
    return Address(
        place="local",
        given=repr(_cut(source)),
        label=path.name,
        key=f"local:{path.resolve()}:{status.st_size}:{status.st_mtime_ns}",
        trusted=trusted,
        file=path,
    )


def _url(source: str, scheme: str, trusted: bool) -> Address:
    given = repr(_cut(shown(source)))
    try:
        parts = urlsplit(source)
        host = (parts.hostname or "").lower()
    except ValueError:
        parts, host = None, ""
    if parts is None or not host or scheme not in ("http", "https"):
        raise UserError(f"{given} names no LoRA; give {FORMS}.")
    steps = [unquote(step) for step in parts.path.split("/") if step]
    if host in REPLICATE_HOSTS:
        raise UserError(f"{given} is a page of Replicate, not a file. {REPLICATE_HINT}")
    if CIVITAI.fullmatch(host) and steps[:1] == ["models"]:
        raise UserError(_civitai_page(given, parse_qs(parts.query)))
    ours = f"{scheme}://{parts.netloc}".rstrip("/") == hub.endpoint()
    if (host in HUB_HOSTS or ours) and len(steps) >= 2 and steps[0] not in ("datasets", "spaces", "api"):
        return _hub_page(steps, source, trusted)
    refuse_pickle(parts.path, name=given)
    url = source.partition("#")[0]
    return Address(
        place="url", given=given, label=_cut(shown(url)), key=f"url:{url}", trusted=trusted, url=url
    )


def _civitai_page(given: str, query: dict[str, list[str]]) -> str:
    version = query.get("modelVersionId", [""])[0]
    known = version.isdecimal() and len(version) < 20
    address = f"https://civitai.com/api/download/models/{version if known else '<modelVersionId>'}"
    where = "" if known else ", with the number behind modelVersionId= in the address of the version's page"
    return (
        f"{given} is a page of CivitAI, and the number in it is the model's, not a version's. Give the "
        f"address of the download: {address}{where}."
    )


def _hub_page(steps: list[str], source: str, trusted: bool) -> Address:
    repository, kind, rest = "/".join(steps[:2]), steps[2:3], steps[4:]
    given = shown(source)
    if not hub.REPOSITORY.fullmatch(repository) or ".." in "/".join(steps):
        raise UserError(f"{_cut(given)!r} is no address of a Hugging Face repository.")
    if not kind:
        return _hub(repository, None, None, given, trusted)
    if steps[-1].endswith(".safetensors") and kind[0] not in HUB_PAGES:
        return _hub(repository, None, "/".join(steps[2:]), given, trusted)
    if kind[0] not in HUB_PAGES or len(steps) < 4:
        raise UserError(
            f"{_cut(given)!r} is no file of a Hugging Face repository; give {repository} or "
            f"{repository}/file.safetensors."
        )
    return _hub(repository, steps[3], "/".join(rest), given, trusted)


def _hub(repository: str, revision: str | None, path: str | None, source: str, trusted: bool) -> Address:
    given, path = repr(_cut(source)), (path or "").strip("/")
    refuse_pickle(path, name=given)
    revision = revision or "main"
    label = repository + (f"@{revision}" if revision != "main" else "") + (f"/{path}" if path else "")
    return Address(
        place="hub",
        given=given,
        label=_cut(label),
        key=f"hub:{hub.endpoint()}:{repository}@{revision}:{path}",
        trusted=trusted,
        repository=repository,
        revision=revision,
        path=path,
    )
