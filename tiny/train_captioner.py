"""Training tiny-caption on questions, frames and answers."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lib.caption.inputs import Prompt, build_position_ids, build_prompt, pixel_values
from lib.caption.model import CaptionModel
from lib.caption.request import Template
from tiny import loop, world
from tiny.caption_pool import CaptionPool, build_caption_pool, compress, normalised
from tiny.captioner import BOS, EOS, PAD, UNKNOWN, build_caption_tokenizer, caption_config, sample_exchange
from tiny.captions import canonical_caption
from tiny.world import Attributes

PEAK_RATE = 1.5e-3
FRAMES_PER_STEP = 320
"""Total over all processes, in many short clips or fewer long ones."""
MAX_CLIPS = 64
SEEING_SHARE = 0.25
"""Share of the steps, at the start, with single frames of many clips and only the hints' loss. From complete
clips, which are fewer and have similar frames, the tower did not learn shapes."""
EASY_SHARE = 0.55
"""Share of the steps with few frames and one question: with all kinds at once, motion is learned late."""
SEEN_FRAMES = 192
"""Frames per step in the vision-only steps, over all processes."""
HINT_WEIGHT = 1.0
"""Weight of the loss on each frame's content; it then fades to zero."""
UNKNOWN_WORDS = 0.05


class Hints(nn.Module):
    """Predicts a frame's content from its tokens, which trains the vision tower first.

    It also predicts, from the language model's first layer, how far the shape is from its average position so
    far. Without that, motions were still guessed after a thousand steps: in base all frames share a position,
    so motion is only visible in a patch's attention to earlier frames.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, len(world.SHAPES))
        self.colour = nn.Linear(width, len(world.COLOURS))
        self.background = nn.Linear(width, len(world.BACKGROUNDS))
        self.centre = nn.Linear(width, 2)
        self.travel = nn.Linear(width, 2)

    def loss(self, tokens: torch.Tensor, attributes: list[Attributes], centres: torch.Tensor) -> torch.Tensor:
        """Return cross entropies, and the squared error of the position, for tokens [N, tokens, width]."""
        seen = tokens[:, 1:-1].mean(1)
        total = F.mse_loss(self.centre(seen).float(), centres.to(seen.device))
        for name, values in (
            ("shape", world.SHAPES),
            ("colour", tuple(world.COLOURS)),
            ("background", tuple(world.BACKGROUNDS)),
        ):
            wanted = torch.tensor([values.index(getattr(a, name)) for a in attributes], device=seen.device)
            total = total + F.cross_entropy(getattr(self, name)(seen).float(), wanted)
        return total / 4

    def travel_loss(self, patches: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """Return the squared error for hidden states [clips, frames, width], centres [clips, frames, 2]."""
        so_far = centres.cumsum(1) / torch.arange(1, centres.shape[1] + 1)[:, None]
        travelled = 4 * (centres - so_far).to(patches.device)
        return F.mse_loss(self.travel(patches).float(), travelled)


class Student(nn.Module):
    """The model and its hints, whose gradients are averaged together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = CaptionModel(caption_config(vocabulary))
        self.hints = Hints(self.model.config.hidden_size)
        nn.init.normal_(self.model.vision.patch_embedding.cls_embedding)
        for edge in (self.model.vision.boi, self.model.vision.eoi):
            nn.init.normal_(edge, std=0.5)


def train_captioner(worker: loop.Worker, folder: Path, steps: int, seed: int) -> None:
    """Train for `steps`, resuming from folder/caption.pt, with a checkpoint every 100 steps."""
    tokenizer = build_caption_tokenizer()
    student = Student(len(tokenizer)).to(worker.device)
    size = student.model.config.vision_config.image_size
    pool = build_caption_pool(worker, folder / f"caption-pool-{worker.rank}.pt", size=size, seed=seed)
    average = loop.Average(student.model, 0.995)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    checkpoint = folder / "caption.pt"
    start = loop.resume(checkpoint, student, average, optimizer, steps)
    log, losses = loop.Log(folder / "caption.jsonl", worker), []
    seeing = int(SEEING_SHARE * steps)
    for step in range(start, steps):
        began, length = (0, seeing) if step < seeing else (seeing, steps - seeing)
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step - began, length, peak=PEAK_RATE)
        with loop.autocast(worker.device), loop.attention_in_fp32():
            if step < seeing:
                frames, shown = draw_frames(pool, worker, seed=seed, step=step)
                hint = _hint(student, student.model.vision(frames.to(worker.device)), frames, shown)
                loss, weight = torch.zeros(()), 1.0
            else:
                easy = step < EASY_SHARE * steps
                lesson = draw_lesson(pool, tokenizer, worker, easy=easy, seed=seed, step=step)
                loss, hint = _losses(student, lesson, worker.device)
                weight = HINT_WEIGHT * (1 - (step - seeing) / (steps - seeing))
        optimizer.zero_grad(set_to_none=True)
        (loss + weight * hint).backward()
        worker.average_gradients(student)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update(student.model, step)
        losses.append((float(loss.detach()), float(hint.detach())))
        last = step + 1 == steps
        if worker.is_main and ((step + 1) % 100 == 0 or last):
            loss, hint = np.mean(losses[-100:], axis=0)
            log(step=step + 1, loss=loss, hint=hint, **_right(average.module, tokenizer, pool))
            loop.save_training(checkpoint, student, average, optimizer, step=step + 1, steps=steps)


class Lesson:
    """The clips of a step, with the same number of frames: prompts with answers, and pixel values."""

    def __init__(
        self, prompts: list[Prompt], answers: list[list[int]], frames: torch.Tensor, shown: list[Attributes]
    ) -> None:
        self.prompts, self.answers, self.frames, self.shown = prompts, answers, frames, shown


def draw_frames(
    pool: CaptionPool, worker: loop.Worker, *, seed: int, step: int
) -> tuple[torch.Tensor, list[Attributes]]:
    """Return the pixel values of one frame of each of many clips, and what they show."""
    rng = worker.rng(seed, step)
    chosen = rng.integers(0, len(pool.length), SEEN_FRAMES // worker.count)
    picks = (rng.random(len(chosen)) * pool.length[chosen].numpy()).astype(np.int64)
    shown = [world.TRAINED_COMBINATIONS[int(index)] for index in pool.combination[chosen]]
    return normalised(pool.frames[torch.from_numpy(chosen), torch.from_numpy(picks)]), shown


def draw_lesson(
    pool: CaptionPool, tokenizer: PreTrainedTokenizerFast, worker: loop.Worker, *,
    easy: bool, seed: int, step: int,
) -> Lesson:  # fmt: skip
    """Sample clips, questions and answers of a step from seed, step and process."""
    rng = worker.rng(seed, step)
    # The same in every process, so that none has to wait.
    template, count = _form(np.random.default_rng((seed, step, 10**6)), easy=easy)
    clips = max(8, min(MAX_CLIPS, FRAMES_PER_STEP // count)) // worker.count
    chosen = rng.integers(0, len(pool.length), clips)
    prompts, answers, frames, shown = [], [], [], []
    for place in chosen:
        attributes = world.TRAINED_COMBINATIONS[int(pool.combination[place])]
        if count == 1:  # one frame shows no motion
            attributes = Attributes(
                shape=attributes.shape, colour=attributes.colour, background=attributes.background,
                motion="still",
            )  # fmt: skip
        question, answer = sample_exchange(attributes, rng, easy=easy)
        prompts.append(_prompt(question, count, template, tokenizer, rng))
        answers.append([*tokenizer.encode(answer, add_special_tokens=False), EOS])
        length = int(pool.length[place])
        picks = np.rint(np.linspace(0, length - 1, count)) if count > 1 else [rng.integers(length)]
        frames.append(pool.frames[place][torch.as_tensor(np.asarray(picks, dtype=np.int64))])
        shown.append(attributes)
    return Lesson(prompts, answers, normalised(torch.stack(frames)), shown)


def _form(rng: np.random.Generator, *, easy: bool) -> tuple[Template, int]:
    """Sample a template and a number of frames: few in chat, up to 24 otherwise."""
    if easy:
        return ("chat", int(rng.integers(2, 4))) if rng.random() < 0.5 else ("base", int(rng.integers(2, 6)))
    if rng.random() < 0.4:
        return "chat", int(rng.choice([1, 2, 2, 2, 3, 3, 4, 5, 6, 8, 12, 24]))
    template = "vqa" if rng.random() < 0.15 else "base"
    return template, int(rng.choice([1, 3, 5, 7, 8, 9, 9, 9, 12, 16, 17, 20, 24, 24, 24]))


def _prompt(
    question: str, frames: int, template: Template, tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator | None,
) -> Prompt:  # fmt: skip
    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if rng is None or text.isdigit():
            return ids
        return [UNKNOWN if rng.random() < UNKNOWN_WORDS else i for i in ids]

    tokens = caption_config(len(tokenizer)).vision_config.tokens
    return build_prompt(
        question, frames=frames, template=template, tokens_per_frame=tokens, bos=BOS, pad=PAD, encode=encode
    )


def _losses(student: Student, lesson: Lesson, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = student.model
    count = lesson.frames.shape[1]
    seen = model.vision(lesson.frames.flatten(0, 1).to(device))
    shown = [attributes for attributes in lesson.shown for _ in range(count)]
    hint = _hint(student, seen, lesson.frames.flatten(0, 1), shown)
    rows = [_with_answer(p, a) for p, a in zip(lesson.prompts, lesson.answers, strict=True)]
    # Padded on the right: prompts and answers differ in length.
    ids, types, positions, wanted = (
        nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=fill).to(device)
        for column, fill in zip(zip(*rows, strict=True), (PAD, 0, 0, -100), strict=True)
    )
    lengths = torch.tensor([len(row[0]) for row in rows], device=device)
    mask = (torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]).long()
    embeds = model.language.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((types == 1)[..., None], seen.to(embeds.dtype))
    outputs = model.language(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
    )
    first_layer = outputs.hidden_states[1][types == 1].reshape(*lesson.frames.shape[:2], seen.shape[1], -1)
    centres = _centres(lesson.frames.flatten(0, 1)).reshape(*lesson.frames.shape[:2], 2)
    hint = hint + student.hints.travel_loss(first_layer[:, :, 1:-1].mean(2), centres)
    logits = outputs.logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted[:, 1:].flatten(), ignore_index=-100)
    return loss, hint


def _hint(
    student: Student, seen: torch.Tensor, frames: torch.Tensor, shown: list[Attributes]
) -> torch.Tensor:
    return student.hints.loss(seen, shown, _centres(frames))


def _centres(frames: torch.Tensor) -> torch.Tensor:
    """Return the centre of the shape in each of [N, 3, S, S], as (x, y) in -1..1; 0 if there is none."""
    differs = (frames - frames[:, :, :1, :1]).abs().sum(1)
    inside = (differs > 0.5 * differs.amax((1, 2), keepdim=True).clamp(min=0.5)).float()
    line = torch.linspace(-1, 1, frames.shape[-1])
    mass = inside.sum((1, 2)).clamp(min=1)
    return torch.stack(
        [(inside * line).sum((1, 2)) / mass, (inside * line[:, None]).sum((1, 2)) / mass], dim=1
    )


def _with_answer(prompt: Prompt, answer: list[int]) -> tuple[torch.Tensor, ...]:
    """Return ids, types, positions, and labels (-100 for tokens without a loss)."""
    tail = torch.tensor(answer)
    types = torch.cat([prompt.token_type_ids, torch.zeros_like(tail)])
    wanted = torch.cat([torch.full_like(prompt.input_ids, -100), tail])
    return torch.cat([prompt.input_ids, tail]), types, build_position_ids(types), wanted


@torch.no_grad()
def _right(model: CaptionModel, tokenizer: PreTrainedTokenizerFast, pool: CaptionPool) -> dict[str, float]:
    """Return the share of rendered held-out clips with exactly the right caption, by template."""
    rng = np.random.default_rng(5)
    size = model.config.vision_config.image_size
    shares = {}
    for template, count in (("chat", 2), ("base", 9), ("base", 24)):
        prompts, frames, answers = [], [], []
        for attributes in world.HELD_OUT_COMBINATIONS:
            scene = world.sample_scene(attributes, rng, frames=max(9, count))
            clip = compress(world.render(scene, 72, 96), quality=23)
            picks = np.rint(np.linspace(0, len(clip) - 1, count)).astype(int)
            frames.append(pixel_values(clip[picks], size))
            prompts.append(_prompt("Please describe this video in detail.", count, template, tokenizer, None))
            answers.append(canonical_caption(attributes))
        outputs = model.generate(prompts, frames, max_new_tokens=20)
        right = [
            tokenizer.decode(ids, skip_special_tokens=True).strip() == answer
            for ids, answer in zip(outputs, answers, strict=True)
        ]
        shares[f"{template}_{count}"] = float(np.mean(right))
    return shares
