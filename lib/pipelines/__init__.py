"""From a model folder to a ready diffusers pipeline.

Some libraries warn while they are imported, such as torchao, which diffusers imports where it is installed.
So their logs are limited to errors here, before any module of this package imports them.
"""

import logging
import os
import warnings

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
# peft says so when a second LoRA is attached, which is on purpose here.
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
