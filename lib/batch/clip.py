"""One clip by this process's predictor, saved to a file."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.predictors.model import Metrics
from lib.storage.disk import disk_error


def make_clip(predictor: Callable[..., Path], inputs: dict[str, Any], output: Path) -> Metrics:
    """Make a clip, save it as `output`, complete or not at all, and return its metrics. Raises UserError."""
    metrics = Metrics()
    path = predictor(metrics, **inputs)
    partial = partial_path(output)
    try:
        shutil.copyfile(path, partial)
        os.replace(partial, output)
    except OSError as error:
        raise disk_error(error, output) from error
    finally:
        partial.unlink(missing_ok=True)
    return metrics


def partial_path(path: Path) -> Path:
    """Return where a file is written until it is complete."""
    return path.with_name(f".{path.name}.partial")
