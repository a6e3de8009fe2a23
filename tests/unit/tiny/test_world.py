import numpy as np
import pytest

from tiny import world
from tiny.captions import canonical_caption, sample_caption, vocabulary_words
from tiny.judge import ATTRIBUTE_NAMES, judge


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(5)
    return [
        (asked, world.render(world.sample_scene(asked, rng, from_start=i % 2 == 0)))
        for i, asked in enumerate(world.ALL_COMBINATIONS)
    ]


def test_judge_reads_at_least_99_percent_of_rendered_clips_right(clips):
    right = [all(judge(frames).agreement(asked).values()) for asked, frames in clips]
    assert np.mean(right) >= 0.99


def test_judge_reads_clips_at_other_sizes_and_lengths():
    rng = np.random.default_rng(6)
    for asked in world.ALL_COMBINATIONS[::7]:
        frames = world.render(world.sample_scene(asked, rng, frames=17), 96, 128)
        assert all(judge(frames).agreement(asked).values()), asked


def test_judge_is_right_on_none_whose_pixels_are_shuffled(clips):
    rng = np.random.default_rng(7)
    for asked, frames in clips[::5]:
        shuffled = frames.reshape(len(frames), -1, 3).copy()
        for frame in shuffled:
            rng.shuffle(frame)
        agreement = judge(shuffled.reshape(frames.shape)).agreement(asked)
        assert not any(agreement.values()), asked


def test_judge_is_right_on_none_whose_clips_are_swapped_for_others(clips):
    others = clips[113:] + clips[:113]
    for (asked, _), (_, frames) in zip(clips, others, strict=True):
        assert not all(judge(frames).agreement(asked).values())


def test_judge_sees_no_motion_in_shuffled_frames(clips):
    rng = np.random.default_rng(8)
    for asked, frames in clips:
        if asked.motion != "still":
            order = rng.permutation(9)
            steady = abs(np.corrcoef(order, np.arange(9))[0, 1]) > 0.6
            if not steady:
                assert judge(frames[order]).motion != asked.motion


def test_judge_sees_nothing_in_an_empty_frame_and_tells_the_extra_shapes_and_colours():
    empty = np.full((9, 48, 64, 3), 128, np.uint8)
    verdict = judge(empty)
    assert (verdict.shape, verdict.colour, verdict.background) == (None, None, "gray")
    for shape in world.EXTRA_SHAPES:
        for name, colour in world.EXTRA_COLOURS.items():
            for motion in world.EXTRA_MOTIONS + world.MOTIONS:
                path = world.motion_path(motion, (32, 24), 18, 9)
                scene = world.Scene(shape=shape, colour=colour, background=(8, 8, 8), radius=10, path=path)
                verdict = judge(world.render(scene), extra=True)
                assert (verdict.shape, verdict.colour, verdict.motion) == (shape, name, motion)


def test_about_one_combination_in_twelve_is_held_out_and_every_value_is_trained():
    assert 0.07 <= len(world.HELD_OUT_COMBINATIONS) / len(world.ALL_COMBINATIONS) <= 0.1
    for name in ATTRIBUTE_NAMES:
        values = {getattr(a, name) for a in world.ALL_COMBINATIONS}
        assert {getattr(a, name) for a in world.TRAINED_COMBINATIONS} == values
        assert {getattr(a, name) for a in world.HELD_OUT_COMBINATIONS} == values


def test_captions_name_all_four_attributes_in_words_of_the_vocabulary():
    rng = np.random.default_rng(9)
    words = set(vocabulary_words())
    for asked in world.ALL_COMBINATIONS:
        caption = sample_caption(asked, rng).lower().replace("grey", "gray")
        assert asked.colour in caption and asked.shape in caption and asked.background in caption
        if asked.motion != "still":
            assert asked.motion in caption
        assert set(canonical_caption(asked).split()) <= words


def test_a_first_frame_for_image_to_video_does_not_reveal_the_motion():
    starts = {}
    rng = np.random.default_rng(10)
    for motion in world.MOTIONS:
        asked = world.Attributes(shape="circle", colour="red", background="black", motion=motion)
        scenes = [world.sample_scene(asked, rng, from_start=True) for _ in range(400)]
        starts[motion] = np.mean([scene.path[0] for scene in scenes], axis=0)
    spread = np.ptp(np.stack(list(starts.values())), axis=0)
    assert spread.max() < 1.5
