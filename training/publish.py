"""Uploads to the Hugging Face Hub: the result, and checkpoints as they are made if asked to."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.errors import UserError
from lib.sources import local_sources_allowed
from training.config import TrainingConfig

CHECKPOINTS = "checkpoints"


class Publisher:
    """The repository that receives a run. Without hub_model_id, or unless `active`, it does nothing.

    Raises UserError at once when the token may not write there, not after hours of training.
    """

    def __init__(self, config: TrainingConfig, report: Callable[[str], None], *, active: bool) -> None:
        self.repository = config.hub_model_id if active else ""
        own = os.environ.get("HF_TOKEN") if local_sources_allowed() else None  # not for strangers' requests
        self.token = config.hub_token or own or None
        self.push_checkpoints = config.push_checkpoints
        self.report = report
        if self.repository:
            self._create()

    def checkpoint(self, folder: Path) -> None:
        """Upload one checkpoint. A failure is reported and does not stop the training."""
        if self.repository and self.push_checkpoints:
            self._upload(folder, f"{CHECKPOINTS}/{folder.name}", f"Checkpoint {folder.name}")

    def result(self, folder: Path) -> None:
        """Upload the results. A failure is reported: what was trained is not lost for it."""
        if self.repository and self._upload(folder, ".", "LoRA, model card and loss curve"):
            self.report(f"uploaded to https://huggingface.co/{self.repository}")

    def _create(self) -> None:
        from huggingface_hub import HfApi

        if self.token is None:
            raise UserError(
                f"hub_model_id={self.repository} needs hub_token, a Hugging Face token with write access."
            )
        try:
            with _online():
                api = HfApi(token=self.token)
                api.create_repo(self.repository, private=True, exist_ok=True)
                api.auth_check(self.repository, write=True)  # it may have been there and be another's
        except Exception as error:  # each HTTP library has its own, and the Hub's changes it
            raise UserError(
                f"hub_model_id={self.repository} cannot be written to: {_plain(error)}. Check the name, and "
                "that hub_token has write access."
            ) from error

    def _upload(self, folder: Path, place: str, message: str) -> bool:
        from huggingface_hub import HfApi

        try:
            with _online():
                HfApi(token=self.token).upload_folder(
                    repo_id=self.repository, folder_path=folder, path_in_repo=place, commit_message=message
                )
        except Exception as error:  # whatever it is, hours of training must not be lost for it
            self.report(f"{folder.name} could not be uploaded to {self.repository}: {_plain(error)}")
            return False
        return True


def _plain(error: Exception) -> str:
    """The first line, which names the status; the rest repeats addresses and request numbers."""
    return str(error).strip().split("\n")[0].rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def _online() -> Iterator[None]:
    """Undo lib.weights.go_offline for an upload: loading models stays offline, and telemetry off."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = False, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
