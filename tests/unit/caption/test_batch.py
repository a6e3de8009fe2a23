"""Captions in batches when the GPU runs out of memory, which is simulated."""

import pytest
import torch

from lib.caption.batch import caption_within_memory
from lib.caption.captioner import Caption, Captioner, SampledClip, load_captioner
from lib.caption.request import CaptionSettings
from lib.errors import UserError
from tests.caption_factory import write_captioner

SETTINGS = CaptionSettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Captioner:
    folder = write_captioner(tmp_path_factory.mktemp("model") / "captioner", ends=False)
    return load_captioner(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def clips() -> list[SampledClip]:
    random = torch.Generator().manual_seed(3)
    return [
        SampledClip(pixel_values=torch.randn(frames, 3, 48, 48, generator=random), sampling="chat")
        for frames in (1, 3, 2, 5, 4, 2, 1)
    ]


def with_memory_for(count: int, monkeypatch) -> list[int]:
    """Let batches of more than `count` clips run out of memory; return the sizes of the batches."""
    asked: list[int] = []
    original = Captioner.caption

    def small(self, clips, *arguments, **options) -> list[Caption]:
        asked.append(len(clips))
        if len(clips) > count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, clips, *arguments, **options)

    monkeypatch.setattr(Captioner, "caption", small)
    return asked


def test_a_batch_that_does_not_fit_is_split_with_the_same_captions(captioner, clips, monkeypatch):
    alone = captioner.caption(clips, SETTINGS)
    lines: list[str] = []
    asked = with_memory_for(2, monkeypatch)
    captions, fits = caption_within_memory(captioner, clips, SETTINGS, limit=8, report=lines.append)
    assert captions == alone
    assert len({caption.text for caption in captions}) > 1
    assert fits == 1
    assert asked == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert lines == [
        "a batch of 7 does not fit into the GPU's memory: batches of 3 from now on",
        "a batch of 3 does not fit into the GPU's memory: batches of 1 from now on",
    ]


def test_a_clip_that_does_not_fit_alone_is_an_error_with_a_remedy(captioner, clips, monkeypatch):
    with_memory_for(0, monkeypatch)
    with pytest.raises(UserError) as caught:
        caption_within_memory(captioner, clips[:2], SETTINGS, limit=2, report=lambda line: None)
    assert str(caught.value) == (
        "the GPU has too little memory for one clip. COGVIDEOX_QUANTIZATION=int8 or int4 makes the model "
        "smaller."
    )
