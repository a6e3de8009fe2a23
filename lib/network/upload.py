"""Uploads to the Hugging Face Hub: a repository that may be written to, and folders into it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lib.errors import UserError
from lib.network.urls import local_sources_allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A repository that the token may write to."""

    name: str
    token: str = field(repr=False)

    @property
    def address(self) -> str:
        return f"https://huggingface.co/{self.name}"

    def upload(self, folder: Path, *, message: str, place: str = ".") -> None:
        """Put a folder's content at `place` in one commit. Raises UserError when that fails."""
        from huggingface_hub import HfApi

        try:
            with _online():
                HfApi(token=self.token).upload_folder(
                    repo_id=self.name, folder_path=folder, path_in_repo=place, commit_message=message
                )
        except Exception as error:  # each HTTP library has its own, and the Hub's changes it
            raise UserError(
                f"{folder.name} could not be uploaded to {self.name}: {_plain(error)}"
            ) from error  # fmt: skip


def claim(name: str, token: str | None, *, setting: str) -> Repository:
    """Make the private repository unless it is there, and see that the token may write to it.

    `setting` is the input that names it, for messages; its token is hub_token. Without one HF_TOKEN counts,
    on a server that only its owner reaches. Raises UserError.
    """
    from huggingface_hub import HfApi

    own = os.environ.get("HF_TOKEN") if local_sources_allowed() else None  # not for strangers' requests
    token = token or own or None
    if token is None:
        raise UserError(f"{setting}={name} needs hub_token, a Hugging Face token with write access.")
    try:
        with _online():
            api = HfApi(token=token)
            api.create_repo(name, private=True, exist_ok=True)
            api.auth_check(name, write=True)  # it may have been there and be another's
    except Exception as error:  # each HTTP library has its own, and the Hub's changes it
        raise UserError(
            f"{setting}={name} cannot be written to: {_plain(error)}. Check the name, and "
            "that hub_token has write access."
        ) from error
    return Repository(name=name, token=token)


def _plain(error: Exception) -> str:
    """The first line, which names the status; the rest repeats addresses and request numbers."""
    return str(error).strip().split("\n")[0].rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def _online() -> Iterator[None]:
    """Undo lib.network.offline.go_offline for an upload: loading models stays offline, and telemetry off."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = False, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
