"""The embedded models follow their prompts. `script/bench quality` prints the complete table."""

import functools
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lib.caption.captioner import load_captioner
from lib.video.writer import write_video
from tiny import evaluate_captions
from tiny.captions import canonical_caption
from tiny.evaluate import Result, evaluate, load_generator, summarise
from tiny.train_vae import reconstruction_quality
from tiny.world import ALL_COMBINATIONS, FPS, is_held_out

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
# Shares over a small sample, well below those in the complete table, so that chance does not fail them.
FLOORS = {"colour": 0.85, "background": 0.85, "motion": 0.8, "shape": 0.7, "all four": 0.65}


@functools.cache
def generated(task: str) -> list[Result]:
    """Twenty clips, in fewer steps than the default's 50, which the complete table has."""
    generator = load_generator(WEIGHTS / f"tiny-{task}")
    return list(evaluate(generator, task, trained=12, held_out=8, seed=11, num_inference_steps=20))


@pytest.mark.parametrize("task", ["t2v", pytest.param("i2v", marks=pytest.mark.slow)])
def test_clips_show_what_the_prompt_says_held_out_combinations_included(task):
    results = generated(task)
    assert sum(is_held_out(result.asked) for result in results) == 8
    summary = summarise(results)
    for name, floor in FLOORS.items():
        assert summary[name] >= floor, summary
    if task == "i2v":
        assert summary["psnr"] >= 22, summary


def test_captions_of_generated_clips_agree_with_their_prompts_nearly_as_often_as_the_judge(tmp_path):
    captioner = load_captioner(WEIGHTS / "tiny-caption", device="cpu", dtype=torch.float32)
    results = generated("t2v")
    clips = []
    for index, result in enumerate(results):
        path = tmp_path / f"{index}.mp4"
        write_video(result.frames, path, fps=FPS, format="mp4", metadata={})
        clips.append((path, result.asked))
    described = evaluate_captions.describe(captioner, clips)
    captioned = evaluate_captions.summarise([each.agreement for each in described])["all four"]
    judged = summarise(results)["all four"]
    assert captioned >= judged - 0.1, (captioned, judged)


def test_the_vae_keeps_shapes_colours_grounds_and_motions():
    vae = load_generator(WEIGHTS / "tiny-t2v").pipeline.vae
    quality = reconstruction_quality(vae, 12)
    assert quality["psnr_eval"] >= 28
    assert all(quality[name] == 1 for name in ("colour", "background", "motion", "shape")), quality


def test_both_models_share_what_is_the_same_by_relative_links_and_stay_small():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file() and not path.is_symlink()]
    own = [path for path in files if not any(parent.is_symlink() for parent in path.parents)]
    assert sum(path.stat().st_size for path in own) <= 60e6
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        link = WEIGHTS / "tiny-i2v" / part
        assert os.readlink(link) == f"../tiny-t2v/{part}"


def test_every_caption_word_is_one_token_with_or_without_a_capital():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "tiny-t2v" / "tokenizer", local_files_only=True)
    text_encoder = load_generator(WEIGHTS / "tiny-t2v").pipeline.text_encoder
    for asked in ALL_COMBINATIONS[::11]:
        caption = canonical_caption(asked)
        ids = [tokenizer(text).input_ids for text in (caption, caption.title())]
        assert len(ids[0]) == len(ids[1]) == len(caption.split()) + 1
        assert tokenizer.unk_token_id not in ids[0] + ids[1]
        with torch.inference_mode():
            plain, capitals = (text_encoder(torch.tensor([i])).last_hidden_state for i in ids)
        assert torch.equal(plain, capitals)
