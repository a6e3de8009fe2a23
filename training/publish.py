"""What of a training goes to the Hugging Face Hub: the result, and checkpoints if asked for."""

from collections.abc import Callable
from pathlib import Path

from lib.errors import UserError
from lib.network.upload import claim
from training.config import TrainingConfig

CHECKPOINTS = "checkpoints"


class Publisher:
    """The repository that receives a run. Without hub_model_id, or unless `active`, it does nothing.

    Raises UserError at once when the token may not write there, not after hours of training.
    """

    def __init__(self, config: TrainingConfig, report: Callable[[str], None], *, active: bool) -> None:
        wanted = config.hub_model_id if active else ""
        self.repository = claim(wanted, config.hub_token, setting="hub_model_id") if wanted else None
        self.push_checkpoints = config.push_checkpoints
        self.report = report

    def checkpoint(self, folder: Path) -> None:
        """Upload one checkpoint. A failure is reported and does not stop the training."""
        if self.push_checkpoints:
            self._upload(folder, f"{CHECKPOINTS}/{folder.name}", f"Checkpoint {folder.name}")

    def result(self, folder: Path) -> None:
        """Upload the results. A failure is reported: what was trained is not lost for it."""
        if self._upload(folder, ".", "LoRA, model card and loss curve"):
            self.report(f"uploaded to {self.repository.address}")

    def _upload(self, folder: Path, place: str, message: str) -> bool:
        if self.repository is None:
            return False
        try:
            self.repository.upload(folder, place=place, message=message)
        except UserError as error:
            self.report(str(error))
            return False
        return True
