"""tiny-caption describes rendered clips; test_embedded_models.py has generated ones.

`script/bench quality --task caption` prints the complete table.
"""

from pathlib import Path

import pytest
import torch

from lib.caption.captioner import Captioner, load_captioner
from tiny import world
from tiny.captions import canonical_caption
from tiny.evaluate_captions import agreement, describe, summarise, write_rendered_clips
from tiny.judge import ATTRIBUTE_NAMES

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return load_captioner(WEIGHTS / "tiny-caption", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[tuple[Path, world.Attributes]]:
    return write_rendered_clips(tmp_path_factory.mktemp("clips"), 48, seed=21)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["auto", "uniform"])
def test_captions_of_clips_of_many_sizes_rates_and_lengths_are_correct(captioner, clips, sampling):
    assert sum(world.is_held_out(asked) for _, asked in clips) >= 16
    summary = summarise([each.agreement for each in describe(captioner, clips, frame_sampling=sampling)])
    # Over all clips it is more than 0.95.
    assert summary["all four"] >= 0.85, summary
    assert all(summary[name] >= 0.9 for name in ATTRIBUTE_NAMES), summary


def test_a_correct_caption_is_a_prompt_that_the_embedded_models_know(captioner, clips):
    for each in describe(captioner, clips[:8]):
        if all(each.agreement.values()):
            assert each.text == canonical_caption(each.asked)


def test_agreement_counts_only_what_is_named_once():
    asked = world.Attributes(shape="circle", colour="red", background="gray", motion="still")
    assert all(agreement("A motionless red circle, grey background.", asked).values())
    wrong = agreement("a red and blue circle moves left on a gray background", asked)
    assert wrong == {"colour": False, "background": True, "motion": False, "shape": True}


def test_the_model_is_small():
    files = [path for path in (WEIGHTS / "tiny-caption").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
