"""The writer: an instruct language model that turns ideas into scenes, and prompts into better ones."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.progress import Report
from lib.story.messages import Message, prompt_messages, story_messages, with_correction
from lib.story.storyboard import MAX_TITLE, Scene, clean

TRIES = 3
TOKENS_PER_SCENE = 400
"""At most; a video prompt of 100 words and an image prompt have some 200."""
SHOWN_ANSWER = 2000
"""Characters of a wrong answer that are shown to the writer again."""
DETAILED = 0.4
"""A prompt that fills this share of what the video model reads is detailed already."""

CountTokens = Callable[[str], int]
T = TypeVar("T")


class _Stop(StoppingCriteria):
    """Raises Stopped between two tokens."""

    def __init__(self, stop: threading.Event | None) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: Any) -> Any:
        check_stop(self.stop)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(kw_only=True, slots=True)
class Writer:
    """A loaded language model with its tokenizer. Not thread-safe."""

    model: Any
    tokenizer: Any
    report: Report

    @classmethod
    def load(cls, folder: Path, *, device: str, dtype: torch.dtype, report: Report) -> Self:
        """Load a transformers folder. Raises UserError if its tokenizer has no chat template."""
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"The writer {folder.name} has no chat template, so it does not follow instructions; choose "
                "an instruct model with COGVIDEOX_WRITER."
            )
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        return cls(model=model.to(device).eval(), tokenizer=tokenizer, report=report)

    def write_scenes(
        self,
        idea: str,
        scenes: int,
        *,
        seed: int,
        count_tokens: CountTokens,
        longest: int,
        stop: threading.Event | None = None,
    ) -> tuple[Scene, ...]:
        """Return the scenes of an idea; the same seed gives the same ones.

        Args:
            count_tokens: Counts a text's tokens as the video model does, of which it reads `longest`.

        Raises:
            UserError: Three answers in a row could not be used.
        """

        def read(content: dict) -> tuple[Scene, ...]:
            return _read_scenes(content, scenes)

        found = self._ask(story_messages(idea, scenes), read, seed, scenes * TOKENS_PER_SCENE, stop)
        return tuple(
            Scene(
                title=scene.title,
                prompt=cut_at_sentence(scene.prompt, count_tokens, longest),
                image_prompt=scene.image_prompt,
            )
            for scene in found
        )

    def enhance(
        self,
        prompt: str,
        *,
        seed: int,
        count_tokens: CountTokens,
        longest: int,
        stop: threading.Event | None = None,
    ) -> str:
        """Return a prompt with more detail; one that is detailed already is returned unchanged.

        The other arguments and errors are those of write_scenes.
        """
        prompt = clean(prompt)
        if not prompt or count_tokens(prompt) >= DETAILED * longest:
            return prompt
        better = self._ask(prompt_messages(prompt), _read_prompt, seed, TOKENS_PER_SCENE, stop)
        return cut_at_sentence(better, count_tokens, longest)

    def _ask(
        self,
        messages: list[Message],
        read: Callable[[dict], T],
        seed: int,
        longest: int,
        stop: threading.Event | None,
    ) -> T:
        """Ask until `read` understands the answer, each time with what was wrong with the one before."""
        problem = ""
        for attempt in range(TRIES):
            answer = self._answer(messages, (seed + attempt) % 2**63, longest, stop)
            try:
                return read(_first_object(answer))
            except _WrongAnswer as error:
                problem = str(error)
            self.report(f"The writer's answer {attempt + 1} cannot be used: {problem}.")
            messages = with_correction(messages, answer[:SHOWN_ANSWER], problem)
        raise UserError(
            f"The writer gave {TRIES} answers that cannot be used (the last one: {problem}). Try another "
            "seed, other words, or give a storyboard."
        )

    @torch.inference_mode()
    def _answer(self, messages: list[Message], seed: int, longest: int, stop: threading.Event | None) -> str:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, enable_thinking=False
        ).to(self.model.device)
        given = inputs["input_ids"].shape[1]
        room = getattr(self.model.config, "max_position_embeddings", given + longest) - given
        if room < 1:
            raise UserError(
                f"The idea is too long for the writer: it has {given:,} tokens with its instructions."
            )
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            output = self.model.generate(
                **inputs,
                max_new_tokens=min(longest, room),
                stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        return self.tokenizer.decode(output[0, given:], skip_special_tokens=True)


class _WrongAnswer(Exception):
    """An answer of the writer that cannot be used; the message says why."""


def cut_at_sentence(text: str, count_tokens: CountTokens, longest: int) -> str:
    """Return as many whole sentences of a text as fit into `longest` tokens, else as many words."""
    if count_tokens(text) <= longest:
        return text
    for mark in (". ", " "):
        parts = text.split(mark)
        low, high = 0, len(parts)
        while low < high:
            middle = (low + high + 1) // 2
            if count_tokens(mark.join(parts[:middle])) <= longest - 1:
                low = middle
            else:
                high = middle - 1
        if low:
            short = mark.join(parts[:low])
            return f"{short}." if mark == ". " else short
    return text


def _first_object(answer: str) -> dict:
    """Return the first JSON object in an answer. Raises _WrongAnswer."""
    start = answer.find("{")
    if start < 0:
        raise _WrongAnswer("there is no JSON object in it")
    try:
        content, _ = json.JSONDecoder(strict=False).raw_decode(answer, start)
    except (ValueError, RecursionError):
        raise _WrongAnswer("its JSON is damaged or ends too early") from None
    return content


def _read_scenes(content: dict, count: int) -> tuple[Scene, ...]:
    scenes = content.get("scenes")
    if not isinstance(scenes, list):
        raise _WrongAnswer('it has no list "scenes"')
    if len(scenes) != count:
        raise _WrongAnswer(f"it has {len(scenes)} scenes instead of {count}")
    return tuple(_read_scene(scene, number) for number, scene in enumerate(scenes, start=1))


def _read_scene(scene: object, number: int) -> Scene:
    if not isinstance(scene, dict):
        raise _WrongAnswer(f"scene {number} is not an object")
    texts = {key: scene.get(key) for key in ("title", "prompt", "image_prompt")}
    for key, text in texts.items():
        if not isinstance(text, str) or not clean(text):
            raise _WrongAnswer(f"scene {number} has no {key}")
    title, prompt, image_prompt = (clean(str(text)) for text in texts.values())
    return Scene(title=title[:MAX_TITLE].rstrip(), prompt=prompt, image_prompt=image_prompt)


def _read_prompt(content: dict) -> str:
    prompt = content.get("prompt")
    if not isinstance(prompt, str) or not clean(prompt):
        raise _WrongAnswer("it has no prompt")
    return clean(prompt)
