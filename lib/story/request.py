"""A story as a caller asks for it, checked against the video model's spec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from lib.errors import UserError, shown
from lib.generation.request import build_request
from lib.models.specs import ModelSpec
from lib.story.film import Transition
from lib.story.storyboard import MAX_BYTES, MAX_SCENES, Storyboard, clean, parse_storyboard
from lib.text_limits import check_length
from lib.video.images import read_image

StopAfter = Literal["storyboard", "images", "film"]
MAX_TRANSITION_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryRequest:
    """What to make, checked. `build_story` makes one."""

    idea: str
    scenes: int
    storyboard: Storyboard | None
    image: Image.Image | None
    """The first scene's keyframe."""
    stop_after: StopAfter
    only_scene: int | None
    transition: Transition
    transition_seconds: float
    seed: int | None
    width: int
    height: int
    video: dict[str, Any]
    """The other inputs of build_request, the same for each scene."""


def build_story(
    spec: ModelSpec,
    *,
    idea: str,
    scenes: int,
    storyboard: Path | None,
    image: Path | None,
    stop_after: StopAfter,
    only_scene: int | None,
    transition: Transition,
    transition_seconds: float,
    seed: int | None,
    width: int | None,
    height: int | None,
    **video: Any,
) -> StoryRequest:
    """Check a request against a video model's spec. Raises UserError.

    `video` has the inputs of build_request besides prompt, image and seed.
    """
    check_length("idea", idea)
    if not 1 <= scenes <= MAX_SCENES:
        raise UserError(f"scenes={scenes} is not possible: use 1 to {MAX_SCENES}.")
    for name, value, allowed in (
        ("stop_after", stop_after, get_args(StopAfter)),
        ("transition", transition, get_args(Transition)),
    ):
        if value not in allowed:
            raise UserError(f"{name}={shown(value)} is unknown; allowed are {', '.join(allowed)}.")
    if not 0 <= transition_seconds <= MAX_TRANSITION_SECONDS:
        raise UserError(
            f"transition_seconds={transition_seconds:g} is not possible: use 0 to {MAX_TRANSITION_SECONDS:g}."
        )
    if only_scene is not None and not 1 <= only_scene <= MAX_SCENES:
        raise UserError(f"only_scene={only_scene} is not possible: use 1 to {MAX_SCENES}, or leave it empty.")
    given = None if storyboard is None else _read(storyboard)
    picture = None if image is None else read_image(image, name="the given image")
    if width is None and height is None and picture is not None:
        width, height = spec.nearest_size(picture.width, picture.height)
    video |= {"fps": None}  # the model's own: clips of one film have one rate
    checked = build_request(spec, prompt="", seed=seed, width=width, height=height, **video)
    return StoryRequest(
        idea=clean(idea),
        scenes=scenes,
        storyboard=given,
        image=picture,
        stop_after=stop_after,
        only_scene=only_scene,
        transition=transition,
        transition_seconds=transition_seconds,
        seed=None if seed is None else checked.seed,
        width=checked.width,
        height=checked.height,
        video=video,
    )


def _read(storyboard: Path) -> Storyboard:
    try:
        with storyboard.open("rb") as file:  # no more than is allowed: it may be of any size
            return parse_storyboard(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise UserError(f"storyboard cannot be read: {error.strerror}.") from None
