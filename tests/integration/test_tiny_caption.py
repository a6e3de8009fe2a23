"""tiny-caption says what clips show. `script/bench quality --task caption` prints the whole table."""

from pathlib import Path

import pytest
import torch

from lib.caption.captioner import Captioner, load_captioner
from lib.video import write_video
from tiny import world
from tiny.captions import canonical_caption
from tiny.evaluate import evaluate, load_generator
from tiny.evaluate_captions import agreement, describe, summarise, write_rendered_clips
from tiny.judge import ATTRIBUTE_NAMES

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return load_captioner(WEIGHTS / "tiny-caption", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("sampling", ["auto", "uniform"])
def test_clips_of_many_sizes_rates_and_lengths_are_named_right(captioner, tmp_path, sampling):
    clips = write_rendered_clips(tmp_path, 48, seed=21)
    assert sum(world.is_held_out(asked) for _, asked in clips) >= 16
    summary = summarise([each.agreement for each in describe(captioner, clips, frame_sampling=sampling)])
    # The whole table has more than 0.95; chance alone must not fail the test.
    assert summary["all four"] >= 0.85, summary
    assert all(summary[name] >= 0.9 for name in ATTRIBUTE_NAMES), summary


def test_captions_of_generated_clips_agree_with_their_prompts_nearly_as_often_as_the_judge(
    captioner, tmp_path
):
    results = list(evaluate(load_generator(WEIGHTS / "tiny-t2v"), "t2v", trained=16, held_out=8, seed=12))
    clips = []
    for index, result in enumerate(results):
        path = tmp_path / f"{index}.mp4"
        write_video(result.frames, path, fps=world.FPS, format="mp4", metadata={})
        clips.append((path, result.asked))
    judged = summarise([result.agreement for result in results])["all four"]
    captioned = summarise([each.agreement for each in describe(captioner, clips)])["all four"]
    assert captioned >= judged - 0.1, (captioned, judged)


def test_a_caption_is_a_prompt_that_the_embedded_models_know(captioner, tmp_path):
    clips = write_rendered_clips(tmp_path, 8, seed=4)
    for each in describe(captioner, clips):
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
