"""A captioner of the embedded size with random weights, whose captions are nonsense but reproducible."""

from pathlib import Path

import torch

from lib.caption.model import CaptionModel
from tiny.caption_checkpoint import save_model
from tiny.captioner import BOS, EOS, PAD, UNKNOWN, build_caption_tokenizer, caption_config


def write_captioner(folder: Path, *, seed: int = 0, ends: bool = True) -> Path:
    """Write a captioning model to a new folder; without `ends` only max_new_tokens ends its captions."""
    torch.manual_seed(seed)
    tokenizer = build_caption_tokenizer()
    model = CaptionModel(caption_config(len(tokenizer))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # with the default initialization every caption repeats one word
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
        head = model.language.lm_head.weight
        head[[BOS, PAD, UNKNOWN, *([] if ends else [EOS])]] = 0.0  # never generated
    folder.mkdir(parents=True)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return folder
