"""The logs and progress bars of diffusers and transformers."""

import diffusers.utils.logging
import transformers.utils.logging
from huggingface_hub.utils import disable_progress_bars


def silence_libraries() -> None:
    """Turn off bars and warnings: what a caller should know is reported by this project."""
    disable_progress_bars()
    for logs in (diffusers.utils.logging, transformers.utils.logging):
        logs.disable_progress_bar()
        logs.set_verbosity_error()
