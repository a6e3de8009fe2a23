"""Make one clip with this process's predictor and save it to a file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.predictors.model import Metrics
from lib.storage.disk import replacing


def make_clip(predictor: Callable[..., Path], inputs: dict[str, Any], output: Path) -> Metrics:
    """Make a clip, save it as `output`, complete or not at all, and return its metrics. Raises UserError."""
    metrics = Metrics()
    path = predictor(metrics, **inputs)
    with replacing(output) as partial:
        shutil.copyfile(path, partial)
    return metrics
