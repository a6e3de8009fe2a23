"""The Hugging Face Hub: the files of a repository, and the headers to download them.

Files are downloaded by lib/network/download.py, which resumes inside a file; huggingface_hub downloads an
interrupted file from the start, up to 5 GB for these checkpoints.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from huggingface_hub import get_token

from lib.errors import UserError, shown
from lib.network.http import FetchError, Source, read
from lib.network.transport import ANYTHING, Rules
from lib.settings import current

REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
LISTING_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a repository: its path, its bytes, and its SHA-256 if it is stored with LFS."""

    path: str
    size: int | None
    sha256: str | None
    url: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Files of a repository at one commit, all or some of them."""

    repository: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]


class NoRepositoryError(UserError):
    """The Hub has no such repository, or does not show it to this token."""


def endpoint() -> str:
    """Return the address of the Hub: HF_ENDPOINT, by default https://huggingface.co."""
    return current().hub_endpoint


def listing(
    repository: str,
    revision: str,
    *,
    headers: Mapping[str, str],
    kind: Literal["models", "datasets"] = "models",
    rules: Rules = ANYTHING,
) -> Snapshot:
    """Resolve a revision and list every file. Raises UserError, NoRepositoryError among them.

    `headers` are operator_headers() or request_headers().
    """
    hub = endpoint()
    address = f"{hub}/api/{kind}/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    pages = hub if kind == "models" else f"{hub}/{kind}"
    try:
        answer = json.loads(read(Source(url=address, headers=headers, max_bytes=LISTING_BYTES, rules=rules)))
        commit = str(answer["sha"])
        entries = [(str(entry["rfilename"]), entry) for entry in answer["siblings"]]
    except FetchError as error:
        raise _explained(error, repository, revision, kind) from error
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


def operator_headers() -> dict[str, str]:
    """Return the headers with the operator's Hub token, if there is one (HF_TOKEN or `hf auth login`)."""
    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def request_headers(repository: str) -> dict[str, str]:
    """Return the headers for a repository that a request names: without the operator's token.

    COGVIDEOX_LOCAL_SOURCES=1 and COGVIDEOX_HUB_REPOSITORIES say for which ones it is used.
    """
    return operator_headers() if may_use_token(repository) else {}


def may_use_token(repository: str) -> bool:
    """Return whether requests may read a repository with the operator's token."""
    listed = (repository.lower(), f"{repository.partition('/')[0].lower()}/*")
    return current().local_sources or not current().hub_repositories.isdisjoint(listed)


def _explained(error: FetchError, repository: str, revision: str, kind: str) -> UserError:
    code = error.headers.get("X-Error-Code")
    what = "repository" if kind == "models" else "data set"
    if code == "RevisionNotFound":
        return UserError(
            f"{repository} has no revision {shown(revision)} on the Hugging Face Hub. Check the revision."
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
