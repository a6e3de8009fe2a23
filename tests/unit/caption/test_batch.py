"""Captions in batches where the GPU has too little memory: it is made out, since no test has a GPU."""

import pytest
import torch

from lib.caption.batch import within_memory
from lib.caption.captioner import Caption, Captioner, CaptionSettings, SampledClip, load_captioner
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
        SampledClip(
            pixel_values=torch.randn(frames, 3, 48, 48, generator=random), sampling="chat", seconds=2.0
        )
        for frames in (1, 3, 2, 5, 4, 2, 1)
    ]


def with_memory_for(count: int, monkeypatch) -> list[int]:
    """Let the model run out of memory with more than that many clips; how many it was asked about."""
    asked: list[int] = []
    original = Captioner.caption

    def small(self, clips, *arguments, **options) -> list[Caption]:
        asked.append(len(clips))
        if len(clips) > count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, clips, *arguments, **options)

    monkeypatch.setattr(Captioner, "caption", small)
    return asked


def test_a_batch_that_does_not_fit_is_done_in_smaller_ones_with_the_same_captions(
    captioner, clips, monkeypatch
):
    alone = captioner.caption(clips, SETTINGS)
    said: list[str] = []
    asked = with_memory_for(2, monkeypatch)
    captions, fits = within_memory(captioner, clips, SETTINGS, at_once=8, report=said.append)
    assert captions == alone
    assert len({caption.text for caption in captions}) > 1
    assert fits == 1
    assert asked == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert said == [
        "a batch of 7 does not fit into the GPU's memory: 3 at once from here on",
        "a batch of 3 does not fit into the GPU's memory: 1 at once from here on",
    ]


def test_a_clip_that_does_not_fit_alone_is_an_error_that_says_what_helps(captioner, clips, monkeypatch):
    with_memory_for(0, monkeypatch)
    with pytest.raises(UserError) as caught:
        within_memory(captioner, clips[:2], SETTINGS, at_once=2, report=lambda line: None)
    assert str(caught.value) == (
        "the GPU has too little memory for one clip. COGVIDEOX_QUANTIZATION=8bit or 4bit makes the model "
        "smaller."
    )
