"""Every draw follows from seed, step and global index alone."""

import threading
from dataclasses import fields

import numpy as np
import pytest
import torch

from training.batches import Batch, Chances, Sampler, prefetched
from training.latents import Encodings, LatentCache, Section

CHANNELS, TOKENS, WIDTH = 2, 3, 4


class Store:
    """Encoded clips in a folder, whose values say which clip, side and crop they are."""

    def __init__(self, folder):
        self.cache = LatentCache(folder)
        self.encodings = Encodings(self.cache, text_key="text")
        self.prompt("")

    def prompt(self, text: str) -> None:
        embeddings = torch.full((TOKENS, WIDTH), float(len(text)))
        self.cache.write(self.encodings.prompt_path(text), {"embeddings": embeddings})

    def section(
        self, number: int, *, frames=3, side=(2, 3), sides=1, crops=1, std=0.5, image=True
    ) -> Section:
        """A clip whose latents' mean is 100 * number + 10 * side + crop."""
        caption = "x" * (number + 1)
        self.prompt(caption)
        files = []
        for mirrored in range(sides):
            paths = []
            for crop in range(crops):
                path = self.cache.path("clip", number, mirrored, crop)
                mean = torch.full((frames, CHANNELS, *side), 100.0 * number + 10 * mirrored + crop)
                tensors = {"mean": mean, "std": torch.full_like(mean, std)}
                if image:
                    shape = (3, 1, 4 * side[0], 4 * side[1])
                    tensors["image"] = torch.full(shape, 10 * number + mirrored, dtype=torch.uint8)
                self.cache.write(path, tensors)
                paths.append(path)
            files.append(tuple(paths))
        return Section(f"{number}.mp4", caption, 4 * frames - 3, tuple(files))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def sampler(store: Store, sections: list[Section], **changes) -> Sampler:
    chances = {"flip": 0.0, "caption_dropout": 0.0, "image_dropout": 0.0, "prior": 0.0}
    chances |= {name: changes.pop(name) for name in tuple(changes) if name in chances}
    options = {
        "seed": 1, "global_batch": 4, "scaling_factor": 0.7, "temporal_patch": None, "timesteps": 1000,
    }  # fmt: skip
    return Sampler(sections, store.encodings, chances=Chances(**chances), **options | changes)


def one(made: Sampler, step: int, index: int) -> Batch:
    (batch,) = made.batches(step, [index])
    return batch


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    given = [batch] if batch.condition is None else [batch, batch.condition]
    found = {field.name: getattr(each, field.name) for each in given for field in fields(each)}
    return {name: value for name, value in found.items() if name not in ("prior", "condition")}


def assert_same(first: Batch, second: Batch) -> None:
    assert first.prior == second.prior
    for name, value in tensors(first).items():
        assert torch.equal(value, tensors(second)[name]), name


RANDOM = ("latents", "noise", "timesteps", "image_noise", "image_deviation", "latent_noise")


def test_a_draw_depends_on_seed_step_and_index_alone(store):
    sections = [store.section(number, crops=2, sides=2) for number in range(5)]
    chances = {"flip": 0.5, "caption_dropout": 0.3, "image_dropout": 0.3, "prior": 0.3}
    made = sampler(store, sections, **chances)
    forwards = {(step, index): one(made, step, index) for step in range(6) for index in range(4)}
    again = sampler(store, sections, **chances)
    for place in reversed(list(forwards)):
        assert_same(forwards[place], one(again, *place))


@pytest.mark.parametrize("other", [{"step": 8}, {"index": 1}, {"seed": 2}])
def test_another_step_index_or_seed_draws_everything_differently(store, other):
    """With one clip alone, so that nothing differs by the choice of the clip."""
    section = store.section(1)
    place = {"step": 7, "index": 0}
    before = one(sampler(store, [section], seed=1), **place)
    seed = other.get("seed", 1)
    after = one(
        sampler(store, [section], seed=seed), **place | {k: v for k, v in other.items() if k != "seed"}
    )
    for name in RANDOM:
        assert not torch.equal(tensors(before)[name], tensors(after)[name]), name
    assert torch.equal(before.condition.images, after.condition.images) and torch.equal(
        before.text, after.text
    )


def test_noises_of_one_sample_are_independent(store):
    section = store.section(0, frames=9, side=(16, 16), std=1.0)
    batch = one(sampler(store, [section], scaling_factor=1.0), 3, 0)
    pairs = [
        (batch.latents, batch.noise),
        (batch.noise[:, :1], batch.condition.latent_noise),
        (batch.latents[:, :1], batch.condition.latent_noise),
        (batch.noise.flatten()[:1000], batch.condition.image_noise.flatten()[:1000]),
    ]
    for first, second in pairs:
        correlation = np.corrcoef(first.flatten(), second.flatten())[0, 1]
        assert abs(correlation) < 0.2
        assert abs(first.mean()) < 0.2 and 0.8 < first.std() < 1.2


def test_latents_are_sampled_from_the_posterior_and_scaled(store):
    section = store.section(3, frames=9, side=(16, 16), std=0.5)
    values = torch.cat([one(sampler(store, [section]), step, 0).latents for step in range(4)])
    assert abs(values.mean() - 0.7 * 300) < 0.01
    assert abs(values.std() - 0.7 * 0.5) < 0.01


def test_two_halves_of_a_global_batch_make_the_complete_batch(store):
    sections = [store.section(number, sides=2) for number in range(7)]
    made = sampler(store, sections, global_batch=4, flip=0.5, caption_dropout=0.5)
    (complete,) = made.batches(5, range(4))
    (first,), (second,) = made.batches(5, range(2)), made.batches(5, range(2, 4))
    for name, value in tensors(complete).items():
        assert torch.equal(value, torch.cat([tensors(first)[name], tensors(second)[name]])), name


@pytest.mark.parametrize(("count", "global_batch"), [(1, 1), (5, 1), (5, 2), (3, 8), (8, 4)])
def test_every_epoch_is_a_permutation_of_all_samples(store, count, global_batch):
    sections = [store.section(number) for number in range(count)]
    made = sampler(store, sections, global_batch=global_batch)
    steps = 6 * count
    order = [made.section(step, index).clip for step in range(steps) for index in range(global_batch)]
    epochs = [order[at : at + count] for at in range(0, len(order), count)]
    assert len(epochs) >= 6
    assert all(sorted(epoch) == sorted(each.clip for each in sections) for epoch in epochs)
    if count >= 5:
        assert len({tuple(epoch) for epoch in epochs}) > 2
    other = sampler(store, sections, global_batch=global_batch, seed=9)
    if count >= 5:
        assert order != [other.section(s, i).clip for s in range(steps) for i in range(global_batch)]


def test_chances_have_the_requested_frequency(store):
    section = store.section(0, sides=2, crops=3)
    made = sampler(store, [section], flip=0.25, caption_dropout=0.1, image_dropout=0.05)
    drawn = [one(made, step, index) for step in range(500) for index in range(4)]
    flipped = np.mean([batch.condition.images.flatten()[0] == 1 for batch in drawn])
    no_caption = np.mean([not batch.text.any() for batch in drawn])
    no_image = np.mean([not batch.condition.image_kept for batch in drawn])
    steps = np.array([batch.timesteps.item() for batch in drawn])
    crops = np.bincount([round(batch.latents.mean().item() / 0.7) % 10 for batch in drawn], minlength=3)
    for found, asked in ((flipped, 0.25), (no_caption, 0.1), (no_image, 0.05)):
        assert abs(found - asked) < 4 * (asked * (1 - asked) / 2000) ** 0.5
    assert crops.shape == (3,) and crops.min() > 580
    assert steps.min() < 10 and steps.max() > 989 and abs(steps.mean() - 499.5) < 30
    dropped = np.array([(not batch.text.any(), not batch.condition.image_kept) for batch in drawn])
    assert 0 < dropped.all(1).sum() < 30  # apart from one another: a two-hundredth of all


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_chances_of_zero_and_one_are_exact(store, chance):
    section = store.section(4, sides=2)
    made = sampler(store, [section], flip=chance, caption_dropout=chance, image_dropout=chance)
    for step in range(40):
        batch = one(made, step, 0)
        assert bool(batch.condition.image_kept) == (chance == 0)
        assert batch.text.any() == (chance == 0)
        assert batch.condition.images.flatten()[0] == 40 + chance


@pytest.mark.parametrize("changed", ["flip", "caption_dropout", "image_dropout"])
def test_changing_one_chance_does_not_shift_the_other_draws(store, changed):
    section = store.section(2, sides=2, std=0.5)
    plain, other = sampler(store, [section]), sampler(store, [section], **{changed: 1.0})
    affected = {"flip": {"images", "latents"}, "caption_dropout": {"text"}, "image_dropout": {"image_kept"}}
    for step in range(5):
        before, after = tensors(one(plain, step, 1)), tensors(one(other, step, 1))
        differing = {name for name in before if not torch.equal(before[name], after[name])}
        assert differing == affected[changed]


def test_prior_samples_have_a_prior_prompt_and_nothing_else_changed(store):
    section = store.section(3)
    for prompt in ("prior number one", "the second prior"):
        store.prompt(prompt)
    prompts = ["prior number one", "the second prior"]
    plain = sampler(store, [section], caption_dropout=0.5)
    mixed = sampler(store, [section], caption_dropout=0.5, prior=0.25, prior_prompts=prompts)
    drawn = [(one(plain, step, 0), one(mixed, step, 0)) for step in range(800)]
    chosen = [after.text[0, 0, 0].item() for _, after in drawn if after.prior]
    assert abs(len(chosen) - 200) < 50
    assert set(chosen) == {float(len(prompt)) for prompt in prompts}
    for before, after in drawn[:50]:
        differing = {n for n, v in tensors(before).items() if not torch.equal(v, tensors(after)[n])}
        assert differing == ({"text"} if after.prior else set())
        assert not before.prior


def test_all_prior_prompts_are_drawn_and_never_mixed_with_the_clips_own(store):
    prompts = ["p" * 50, "p" * 60, "p" * 70]
    for prompt in prompts:
        store.prompt(prompt)
    sections = [store.section(number) for number in range(4)]
    made = sampler(store, sections, global_batch=8, prior=0.5, prior_prompts=prompts)
    seen = set()
    for step in range(30):
        batches = list(made.batches(step, range(8)))
        assert sum(len(batch.latents) for batch in batches) == 8 and len(batches) <= 2
        for batch in batches:
            lengths = set(batch.text[:, 0, 0].tolist())
            assert all((length >= 50) == batch.prior for length in lengths)
            seen |= lengths
    assert seen == {1, 2, 3, 4, 50, 60, 70}


def test_the_images_noise_has_the_papers_deviation(store):
    section = store.section(0)
    made = sampler(store, [section])
    logarithms = torch.cat([one(made, step, 0).condition.image_deviation for step in range(1500)]).log()
    assert abs(logarithms.mean() + 3) < 0.05 and abs(logarithms.std() - 0.5) < 0.04


def test_samples_are_batched_by_length_and_size_and_none_is_lost(store):
    shapes = [{"frames": 3}, {"frames": 5}, {"frames": 3}, {"frames": 3, "side": (3, 2)}, {"frames": 5}]
    sections = [store.section(number, **shape) for number, shape in enumerate(shapes)]
    made = sampler(store, sections, global_batch=5)
    batches = list(made.batches(0, range(5)))
    assert sorted(tuple(batch.latents.shape) for batch in batches) == [
        (1, 3, CHANNELS, 3, 2), (2, 3, CHANNELS, 2, 3), (2, 5, CHANNELS, 2, 3),
    ]  # fmt: skip
    captions = sorted(text[0, 0].item() for batch in batches for text in batch.text)
    assert captions == [1, 2, 3, 4, 5]
    alone = [one(made, 0, index) for index in range(5)]
    for name in RANDOM:
        together = {tuple(value.flatten().tolist()) for batch in batches for value in tensors(batch)[name]}
        assert together == {tuple(tensors(batch)[name].flatten().tolist()) for batch in alone}, name


def test_latents_are_padded_in_front_for_a_temporal_patch_and_noise_covers_the_padding(store):
    section = store.section(1, frames=3)
    plain = one(sampler(store, [section]), 0, 0)
    padded = one(sampler(store, [section], temporal_patch=2), 0, 0)
    assert padded.latents.shape[1] == padded.noise.shape[1] == 4
    assert torch.equal(padded.latents[:, 1:], plain.latents)
    assert torch.equal(padded.latents[:, 0], plain.latents[:, 0])
    assert not torch.equal(padded.noise[:, 0], padded.noise[:, 1])
    assert padded.condition.latent_noise.shape[1] == padded.condition.images.shape[2] == 1


def test_text_to_video_has_no_image_and_the_same_draws_otherwise(store):
    with_image, without = store.section(1), store.section(1, image=False)
    text_only = one(sampler(store, [without]), 4, 0)
    store.section(1)
    both = one(sampler(store, [with_image]), 4, 0)
    assert text_only.condition is None and both.condition is not None
    for name in ("latents", "noise", "timesteps", "text"):
        assert torch.equal(getattr(text_only, name), getattr(both, name))


def test_batches_have_the_types_of_the_training_step(store):
    batch = one(sampler(store, [store.section(1)]), 0, 0)
    kinds = {name: value.dtype for name, value in tensors(batch).items()}
    assert kinds == {
        "latents": torch.float32, "noise": torch.float32, "timesteps": torch.int64, "text": torch.float32,
        "images": torch.uint8, "image_noise": torch.float32, "image_deviation": torch.float32,
        "latent_noise": torch.float32, "image_kept": torch.bool,
    }  # fmt: skip


def test_latents_kept_in_bf16_are_sampled_in_float32(store):
    section = store.section(0, std=0.5)
    path = section.files[0][0]
    mean = torch.full((3, CHANNELS, 2, 3), 1.0)
    half = {"mean": mean.bfloat16(), "std": 0.5 * mean.bfloat16(), "image": torch.zeros(3, 1, 8, 12).byte()}
    store.cache.write(path, half)
    batch = one(sampler(store, [section]), 0, 0)
    assert batch.latents.dtype == torch.float32
    assert not torch.equal(batch.latents, batch.latents.bfloat16().float())


# Prefetching


@pytest.mark.parametrize("active", [False, True])
def test_items_come_in_order_and_each_is_made_once(active):
    made = []
    with prefetched(lambda number: made.append(number) or number * 10, range(3, 7), active=active) as items:
        assert list(items) == [30, 40, 50, 60]
    assert made == [3, 4, 5, 6]


@pytest.mark.parametrize("active", [False, True])
def test_an_error_is_raised_where_its_item_is_taken(active):
    with prefetched(lambda number: 1 / (2 - number), range(5), active=active) as items:
        assert next(items) == 0.5 and next(items) == 1
        with pytest.raises(ZeroDivisionError):
            next(items)


def test_the_next_item_is_made_while_this_one_is_used():
    started = threading.Event()

    def make(number):
        if number == 1:
            started.set()
        return number

    with prefetched(make, range(2), active=True) as items:
        assert next(items) == 0
        assert started.wait(20)


def test_no_more_than_one_item_is_made_in_advance():
    made = []
    with prefetched(made.append, range(100), active=True) as items:
        next(items)
    assert len(made) <= 2
