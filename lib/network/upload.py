"""Upload folders to a repository on the Hugging Face Hub."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars

from lib.errors import UserError
from lib.settings import current


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A repository that the token can write to."""

    name: str
    token: str = field(repr=False)

    @property
    def address(self) -> str:
        return f"https://huggingface.co/{self.name}"

    def upload(self, folder: Path, *, message: str, place: str = ".") -> None:
        """Put a folder's content at `place` in one commit. Raises UserError when that fails."""
        try:
            with _online():
                HfApi(token=self.token).upload_folder(
                    repo_id=self.name, folder_path=folder, path_in_repo=place, commit_message=message
                )
        except Exception as error:  # of any HTTP library that huggingface_hub uses
            message = f"{folder.name} could not be uploaded to {self.name}: {_plain(error)}"
            raise UserError(message) from error


def claim(name: str, token: str | None, *, setting: str) -> Repository:
    """Create the private repository unless it exists, and check that the token can write to it.

    `setting` is the input that names it, for messages; `token` is hub_token. Without a token HF_TOKEN is
    used, if the server allows local sources. Raises UserError.
    """
    own = os.environ.get("HF_TOKEN") if current().local_sources else None  # not for untrusted callers
    token = token or own or None
    if token is None:
        raise UserError(f"{setting}={name} needs hub_token, a Hugging Face token with write access.")
    try:
        with _online():
            api = HfApi(token=token)
            api.create_repo(name, private=True, exist_ok=True)
            api.auth_check(name, write=True)  # it may exist and belong to someone else
    except Exception as error:  # of any HTTP library that huggingface_hub uses
        raise UserError(
            f"{setting}={name} cannot be written to: {_plain(error)}. Check the name, and "
            "that hub_token has write access."
        ) from error
    return Repository(name=name, token=token)


def _plain(error: Exception) -> str:
    """Return the first line, which names the status; the rest repeats addresses and request numbers."""
    return str(error).strip().split("\n")[0].rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def _online() -> Iterator[None]:
    """Allow huggingface_hub the network inside the block, despite go_offline; telemetry stays off."""
    disable_progress_bars()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = False, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
