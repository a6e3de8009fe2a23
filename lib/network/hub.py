"""The Hugging Face Hub: which files a repository has, which of them a model needs, and how to ask for them.

The files then come through lib/network/download.py, which continues inside a file after an interruption;
huggingface_hub's own download begins an interrupted file anew, up to 5 GB for these checkpoints.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import quote

from lib.errors import UserError
from lib.models.layout import INDEX
from lib.network.http import FetchError, Source, read
from lib.network.transport import ANYTHING, Rules

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
FOLDERS = frozenset({"scheduler", "text_encoder", "tokenizer", "transformer", "vae"})
# Configurations, weights, vocabularies, licences. Neither code nor pickles: nothing loads them.
SUFFIXES = frozenset({".json", ".safetensors", ".model", ".txt"})
LISTING_BYTES = 16 << 20
# How diffusers and transformers name weights, their variants ("fp16"), and the indices of both.
SHARDED = r"(?:-\d{5}-of-\d{5})?"
PLAIN = re.compile(rf"(?P<stem>[^.]+?){SHARDED}\.safetensors")
VARIANT = re.compile(
    rf"(?P<stem>[^.]+?){SHARDED}\.[\w-]+\.safetensors(?:\.index\.json)?"
    r"|(?P<indexed>[^.]+)\.safetensors\.index\.[\w-]+\.json"
)


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a repository: its path there, its bytes, its SHA-256 where it is stored as a large one."""

    path: str
    size: int | None
    sha256: str | None
    url: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Files of a repository at one commit: all of them, or those that a model needs."""

    repository: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]


class NoRepositoryError(UserError):
    """The Hub has no such repository, or does not show it to this token."""


def snapshot(repository: str, revision: str) -> Snapshot:
    """Resolve a revision and list the model's files. Raises UserError when the repository holds no model."""
    whole = listing(repository, revision)
    wanted = _wanted([file.path for file in whole.files], repository)
    return replace(whole, files=tuple(file for file in whole.files if file.path in wanted))


def endpoint() -> str:
    """Return where the Hub is: HF_ENDPOINT, by default huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def listing(
    repository: str,
    revision: str,
    *,
    kind: Literal["models", "datasets"] = "models",
    rules: Rules = ANYTHING,
) -> Snapshot:
    """Resolve a revision and list every file. Raises UserError, NoRepositoryError among them."""
    hub = endpoint()
    address = f"{hub}/api/{kind}/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    pages = hub if kind == "models" else f"{hub}/{kind}"
    try:
        answer = json.loads(
            read(Source(url=address, headers=headers(), max_bytes=LISTING_BYTES, rules=rules))
        )
        commit = str(answer["sha"])
        entries = [(str(entry["rfilename"]), entry) for entry in answer["siblings"]]
    except FetchError as error:
        raise _rephrased(error, repository, revision, kind) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{hub} did not answer as a Hugging Face Hub does about {repository}.") from error
    files = tuple(
        HubFile(
            path=path,
            size=entry.get("size"),
            sha256=(entry.get("lfs") or {}).get("sha256"),
            url=f"{pages}/{repository}/resolve/{commit}/{quote(path)}",
        )
        for path, entry in entries
    )
    return Snapshot(repository=repository, revision=revision, commit=commit, files=files)


def headers() -> dict[str, str]:
    """Return the headers that carry the user's Hub token, if there is one (HF_TOKEN or `hf auth login`)."""
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _wanted(paths: list[str], repository: str) -> set[str]:
    """Return which files a model needs: the diffusers layout, else the root of a transformers one."""
    places = [PurePosixPath(path) for path in paths]
    if any(place.is_absolute() or ".." in place.parts for place in places):
        raise UserError(f"{repository} lists a file outside itself; it is refused.")
    known = [place for place in places if place.suffix in SUFFIXES or place.name.startswith("LICENSE")]
    root = [place for place in known if len(place.parts) == 1]
    if INDEX in paths:
        chosen = [place for place in known if len(place.parts) == 2 and place.parts[0] in FOLDERS]
        chosen += [place for place in root if place.name == INDEX or place.name.startswith("LICENSE")]
    else:
        chosen = root
    chosen = _without_variants(chosen)
    if not any(place.suffix == ".safetensors" for place in chosen) or not {INDEX, "config.json"} & set(paths):
        raise UserError(
            f"{repository} on the Hub is not a model that can be loaded here: it needs {INDEX} and "
            "safetensors weights in the diffusers layout. Of a SAT checkpoint "
            "script/convert, or the predictor predict_convert, makes such a folder."
        )
    return {str(place) for place in chosen}


def _without_variants(places: list[PurePosixPath]) -> list[PurePosixPath]:
    """Drop weights such as NAME.fp16.safetensors where NAME.safetensors is there, whole or in shards."""
    plain = {(place.parent, match["stem"]) for place in places if (match := PLAIN.fullmatch(place.name))}
    variants = {
        place
        for place in places
        if (match := VARIANT.fullmatch(place.name))
        and (place.parent, match["stem"] or match["indexed"]) in plain
    }
    return [place for place in places if place not in variants]


def _rephrased(error: FetchError, repository: str, revision: str, kind: str) -> UserError:
    code = error.headers.get("X-Error-Code")
    what = "repository" if kind == "models" else "data set"
    if code == "RevisionNotFound":
        return UserError(
            f"{repository} has no revision {revision!r} on the Hugging Face Hub. Check the revision."
        )
    if code == "GatedRepo":
        return UserError(
            f"{repository} is gated: accept its terms on its page on the Hugging Face Hub, then set HF_TOKEN."
        )
    if code == "RepoNotFound" or error.status in (401, 404):
        return NoRepositoryError(
            f"The Hugging Face Hub has no {what} {repository}, or it is private. "
            "Check the name; for a private one set HF_TOKEN."
        )
    return error
