"""Start predictors: check all variables, find or download the model, and only then import torch.

An invalid COGVIDEOX_* value therefore ends the start at once. The modules that import torch are imported in
these functions, after the checks.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lib import settings
from lib.lora import source
from lib.models.specs import Task
from lib.pipelines.prefetch import prefetch
from lib.predictors.model import locate_helpers, resolve_model

if TYPE_CHECKING:
    from lib.predictors.caption import CaptionPredictor
    from lib.predictors.caption_dataset import DatasetCaptionPredictor
    from lib.predictors.story import StoryModels, StoryPredictor
    from lib.predictors.video import VideoPredictor


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector while libraries are imported and the model is loaded.

    It would visit their many lasting objects again and again, which takes a fifth of the start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def start_video(task: Task, weights_url: Path | str | None = None) -> "VideoPredictor":
    """Load the video model that COGVIDEOX_MODEL names, as the other COGVIDEOX_* variables say.

    `weights_url`, or COG_WEIGHTS, is the LoRA of every request that names none, e.g. a training's output. It
    comes from the server's owner, so any address or path is allowed. Raises UserError for an invalid setting.
    """
    started = time.perf_counter()
    model = resolve_model(task)
    prefetch(model.folder)
    default = str(weights_url or settings.current().default_lora)
    default_lora = source.parse(default, trusted=True) if default else None

    from lib.predictors.video import VideoPredictor  # imports torch

    return VideoPredictor.load(model, default_lora=default_lora, started=started)


@_collector_paused()
def start_story() -> "StoryPredictor":
    """Find or download the three models of stories. Raises UserError for an invalid setting."""
    models = prepare_story()

    from lib.predictors.story import StoryPredictor  # imports torch

    return StoryPredictor.load(models)


def prepare_story() -> "StoryModels":
    """Find or download the three models of stories; loads none. Raises UserError for an invalid setting."""
    model = resolve_model("i2v")
    writer, painter = locate_helpers()

    from lib.predictors.story import StoryModels  # imports torch

    return StoryModels.prepare(model, writer=writer, painter=painter)


@_collector_paused()
def start_caption() -> "CaptionPredictor":
    """Load the captioning model that COGVIDEOX_MODEL names. Raises UserError for an invalid setting."""
    started = time.perf_counter()
    model = resolve_model("caption")

    from lib.predictors.caption import CaptionPredictor  # imports torch

    return CaptionPredictor.load(model, started=started)


@_collector_paused()
def start_caption_dataset() -> "DatasetCaptionPredictor":
    """Load the captioning model that COGVIDEOX_MODEL names. Raises UserError for an invalid setting."""
    started = time.perf_counter()
    model = resolve_model("caption")

    from lib.predictors.caption_dataset import DatasetCaptionPredictor  # imports torch

    return DatasetCaptionPredictor.load(model, started=started)
