"""Make a story in a folder: storyboard.json, scene-01.png, scene-01.mp4, film.mp4.

Each stage is finished for all scenes before the model of the next one is loaded. Only what is missing or
whose inputs changed is made; lib/story/records.py tells. A person's own files are taken as they are.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from lib.cancellation import check_stop, untimed
from lib.errors import UserError
from lib.generation.request import MAX_SEED, Request, build_request
from lib.models.specs import ModelSpec
from lib.progress import Report
from lib.story.film import FilmClip, write_film
from lib.story.painter import Painter
from lib.story.records import Records, content_fingerprint
from lib.story.request import StoryRequest
from lib.story.storyboard import Storyboard, parse_storyboard
from lib.story.writer import Writer
from lib.video.images import read_image

STORYBOARD, FILM = "storyboard.json", "film.mp4"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of a keyframe; one that is not .png is a person's own, and comes first."""

MakeClip = Callable[[Request, Path, threading.Event | None], None]
"""Makes the clip of a request at a path; the event stops it."""


class Models(Protocol):
    """The three models. Each is loaded when its block is entered, and freed at its end unless all fit."""

    labels: dict[str, str]
    """The names of "writer", "painter" and "video", without any path of this machine."""

    @property
    def spec(self) -> ModelSpec: ...

    def count_tokens(self, text: str) -> int: ...

    def writer(self) -> AbstractContextManager[Writer]: ...

    def painter(self) -> AbstractContextManager[Painter]: ...

    def video(self) -> AbstractContextManager[MakeClip]: ...


@dataclass(kw_only=True, slots=True)
class Made:
    """The files of a story that a request asked for, and what was made anew."""

    files: list[Path] = field(default_factory=list)
    """The storyboard, then keyframes, clips, film."""
    new: list[str] = field(default_factory=list)
    scenes: int = 0
    """How many the storyboard has."""
    seed: int = 0
    """The first scene's."""


def make_story(
    request: StoryRequest,
    folder: Path,
    models: Models,
    *,
    report: Report,
    stop: threading.Event | None = None,
) -> Made:
    """Make what is missing or outdated in a folder, and return the files that were asked for.

    Raises UserError where the folder's files contradict the request or cannot be read, Stopped once `stop` is
    set. What is complete by then stays.
    """
    work = _Work(request=request, folder=folder, models=models, report=report, stop=stop)
    storyboard = work.storyboard()
    work.made.scenes, work.made.seed = len(storyboard.scenes), storyboard.seed or 0
    numbers = _numbers(storyboard, request.only_scene)
    if request.stop_after != "storyboard":
        work.keyframes(storyboard, numbers)
    if request.stop_after == "film":
        work.clips(storyboard, numbers)
        work.film(storyboard)
    return work.made


def _numbers(storyboard: Storyboard, only: int | None) -> list[int]:
    count = len(storyboard.scenes)
    if only is None:
        return list(range(1, count + 1))
    if only > count:
        raise UserError(f"only_scene={only} is not possible: the storyboard has {count} scenes.")
    return [only]


@dataclass(kw_only=True, slots=True)
class _Work:
    """One run in one folder."""

    request: StoryRequest
    folder: Path
    models: Models
    report: Report
    stop: threading.Event | None
    made: Made = field(default_factory=Made)
    records: Records = field(init=False)

    def __post_init__(self) -> None:
        self.records = Records(self.folder)

    def storyboard(self) -> Storyboard:
        """Return the given storyboard, the folder's, or a new one, which is written to the folder."""
        request = self.request
        inputs = {
            "idea": request.idea,
            "scenes": request.scenes,
            "seed": request.seed,
            "writer": self.models.labels["writer"],
        }
        in_folder = None if request.storyboard else self._in_folder(inputs)
        storyboard = request.storyboard or in_folder or self._written()
        seed = request.seed if request.seed is not None else storyboard.seed
        storyboard = replace(storyboard, seed=_random_seed() if seed is None else seed)
        is_new = storyboard != in_folder
        if is_new:
            with self.records.making(STORYBOARD, inputs) as partial:
                partial.write_text(storyboard.to_json(), encoding="utf-8")
        self._add(STORYBOARD, new=is_new)
        return storyboard

    def _in_folder(self, inputs: object) -> Storyboard | None:
        """Return the folder's storyboard, None where there is none or it has to be written anew."""
        path, idea = self.folder / STORYBOARD, self.request.idea
        state = self.records.state(STORYBOARD, inputs)
        if state == "missing" or (state == "outdated" and idea):
            return None
        storyboard = parse_storyboard(path.read_bytes(), name=path.name)
        if idea not in ("", storyboard.idea):
            raise UserError(
                f"{path.name} was edited and belongs to another idea, {storyboard.idea[:100]!r}. Give "
                "another folder, or remove the file."
            )
        return storyboard

    def _written(self) -> Storyboard:
        request = self.request
        if not request.idea:
            raise UserError("idea is empty: say what the film shows, or give a storyboard.")
        seed = _random_seed() if request.seed is None else request.seed
        self.report(f"writing {request.scenes} scenes")
        with untimed(self.stop), self.models.writer() as writer:
            scenes = writer.write_scenes(
                request.idea,
                request.scenes,
                seed=seed,
                count_tokens=self.models.count_tokens,
                longest=self.models.spec.text_tokens,
                stop=self.stop,
            )
        return Storyboard(idea=request.idea, scenes=scenes, seed=seed)

    def keyframes(self, storyboard: Storyboard, numbers: list[int]) -> None:
        """Paint the first frames that are missing or outdated."""
        wanted = {number: self._keyframe_inputs(storyboard, number) for number in numbers}
        todo = [n for n in numbers if self._keyframe(n) is None or self._is_outdated(n, wanted[n])]
        if 1 in todo and self.request.image is not None:
            with self.records.making(_name(1, ".png"), wanted[1]) as partial:
                self.request.image.save(partial)
            self.made.new.append(_name(1, ".png"))
            todo.remove(1)
        if todo:
            with untimed(self.stop), self.models.painter() as painter:
                for number in todo:
                    self.report(f"scene {number} of {len(storyboard.scenes)}: painting its first frame")
                    scene = storyboard.scenes[number - 1]
                    picture = painter.paint(
                        scene.image_prompt,
                        width=self.request.width,
                        height=self.request.height,
                        seed=_seed(storyboard, number),
                        stop=self.stop,
                    )
                    with self.records.making(_name(number, ".png"), wanted[number]) as partial:
                        picture.save(partial)
                    self.made.new.append(_name(number, ".png"))
        self.made.files += filter(None, map(self._keyframe, numbers))

    def _keyframe_inputs(self, storyboard: Storyboard, number: int) -> dict[str, Any]:
        if number == 1 and self.request.image is not None:
            pixels = hashlib.sha256(self.request.image.tobytes()).hexdigest()
            return {"image": pixels, "size": self.request.image.size}
        return {
            "image_prompt": storyboard.scenes[number - 1].image_prompt,
            "seed": _seed(storyboard, number),
            "size": [self.request.width, self.request.height],
            "painter": self.models.labels["painter"],
        }

    def _keyframe(self, number: int) -> Path | None:
        """Return a scene's first frame, a person's own of another ending first."""
        paths = [self.folder / _name(number, ending) for ending in (*PICTURES[1:], PICTURES[0])]
        return next((path for path in paths if path.is_file()), None)

    def _is_outdated(self, number: int, inputs: object) -> bool:
        keyframe = self._keyframe(number)
        is_own = keyframe is not None and keyframe.suffix != ".png"
        return not is_own and self.records.state(_name(number, ".png"), inputs) == "outdated"

    def clips(self, storyboard: Storyboard, numbers: list[int]) -> None:
        """Make the clips that are missing or outdated."""
        wanted = {number: self._clip_inputs(storyboard, number) for number in numbers}
        names = {number: _name(number, ".mp4") for number in numbers}
        todo = [n for n in numbers if self.records.state(names[n], wanted[n]) in ("missing", "outdated")]
        if todo:
            with untimed(self.stop), self.models.video() as make_clip:
                for number in todo:
                    self.report(f"scene {number} of {len(storyboard.scenes)}: making its clip")
                    request = self._clip_request(storyboard, number)
                    with self.records.making(names[number], wanted[number]) as partial:
                        make_clip(request, partial, self.stop)
                    self.made.new.append(names[number])
        self.made.files += [self.folder / name for name in names.values()]

    def _clip_inputs(self, storyboard: Storyboard, number: int) -> dict[str, Any]:
        keyframe = self._keyframe(number)
        assert keyframe is not None  # the stage before made it
        return {
            "keyframe": content_fingerprint(keyframe),
            "prompt": storyboard.scenes[number - 1].prompt,
            "seed": _seed(storyboard, number),
            "size": [self.request.width, self.request.height],
            "model": self.models.labels["video"],
            "video": self.request.video,
        }

    def _clip_request(self, storyboard: Storyboard, number: int) -> Request:
        keyframe = self._keyframe(number)
        assert keyframe is not None
        return build_request(
            self.models.spec,
            prompt=storyboard.scenes[number - 1].prompt,
            image=read_image(keyframe),
            seed=_seed(storyboard, number),
            width=self.request.width,
            height=self.request.height,
            **self.request.video,
        )

    def film(self, storyboard: Storyboard) -> None:
        """Put all clips together, if they are there."""
        clips = [
            FilmClip(path=self.folder / _name(number, ".mp4"), title=scene.title)
            for number, scene in enumerate(storyboard.scenes, start=1)
        ]
        if not all(clip.path.is_file() for clip in clips):
            return
        check_stop(self.stop)
        inputs = {
            "clips": [[content_fingerprint(clip.path), clip.title] for clip in clips],
            "transition": self.request.transition,
            "seconds": self.request.transition_seconds,
        }
        is_new = self.records.state(FILM, inputs) in ("missing", "outdated")
        if is_new:
            self.report("putting the film together")
            with self.records.making(FILM, inputs) as partial:
                write_film(
                    clips,
                    partial,
                    transition=self.request.transition,
                    seconds=self.request.transition_seconds,
                    metadata={"idea": storyboard.idea, "scenes": str(len(clips))},
                    stop=self.stop,
                )
        self._add(FILM, new=is_new)

    def _add(self, name: str, *, new: bool) -> None:
        self.made.files.append(self.folder / name)
        if new:
            self.made.new.append(name)


def _name(number: int, ending: str) -> str:
    return f"scene-{number:02}{ending}"


def _random_seed() -> int:
    return int.from_bytes(os.urandom(4), "big")


def _seed(storyboard: Storyboard, number: int) -> int:
    return ((storyboard.seed or 0) + number - 1) % (MAX_SEED + 1)
