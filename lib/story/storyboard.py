"""A storyboard: the scenes of a film as a JSON file that people read and edit.

    {"version": 1, "idea": "a lighthouse in a storm, then morning", "seed": 7, "scenes": [
        {"title": "The storm", "prompt": "Waves break over ...", "image_prompt": "A lighthouse ..."},
        ...]}

It has no paths and nothing of the machine that wrote it.
"""

import json
import re
from dataclasses import asdict, dataclass

from lib.errors import UserError, cut, shown
from lib.text_limits import PROMPT

VERSION = 1
MAX_SCENES = 8
MAX_TITLE = 200
MAX_BYTES = 1 << 20
KEYS = ("version", "idea", "seed", "scenes")
SCENE_KEYS = ("title", "prompt", "image_prompt")
TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A shot of the film. The texts are stripped and not empty."""

    title: str
    prompt: str
    """What the video model is told."""
    image_prompt: str
    """What the image model is told: the first frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storyboard:
    """The scenes of a film, in order; 1 to MAX_SCENES."""

    idea: str
    scenes: tuple[Scene, ...]
    seed: int | None = None
    """That of the first scene; the next ones count up."""

    def to_json(self) -> str:
        """Return the text of the file."""
        seed = {} if self.seed is None else {"seed": self.seed}
        content = {"version": VERSION, "idea": self.idea, **seed, "scenes": [asdict(s) for s in self.scenes]}
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def parse_storyboard(data: bytes, *, name: str = "storyboard") -> Storyboard:
    """Read a storyboard's file, perhaps edited by hand. Raises UserError; `name` is what it calls the file.

    HTML tags, control characters and line breaks in texts become spaces.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{name} has more than {MAX_BYTES:,} bytes.")
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{name} is not a JSON file in UTF-8{where}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is not a JSON object with {', '.join(KEYS)}.")
    _check_keys(content, KEYS, name)
    version = content.get("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise UserError(f"{name} has version {shown(version)}; this service reads version {VERSION}.")
    seed = content.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise UserError(f"{name} has the seed {shown(seed)}; it has to be a whole number from 0.")
    scenes = content.get("scenes")
    if not isinstance(scenes, list) or not 1 <= len(scenes) <= MAX_SCENES:
        count = len(scenes) if isinstance(scenes, list) else "no list of"
        raise UserError(f"{name} has {count} scenes; 1 to {MAX_SCENES} are allowed.")
    idea = content.get("idea", "")
    if not isinstance(idea, str) or len(idea) > PROMPT:
        raise UserError(f"{name}: idea has to be a text of at most {PROMPT:,} characters.")
    return Storyboard(
        idea=clean(idea),
        seed=seed,
        scenes=tuple(
            _scene(scene, f"{name}, scene {number}") for number, scene in enumerate(scenes, start=1)
        ),
    )


def clean(text: str) -> str:
    """Return a text on one line, without tags and characters that cannot be shown or stored."""
    return " ".join(SURROGATE.sub(" ", CONTROL.sub(" ", TAG.sub(" ", text))).split())


def _scene(value: object, name: str) -> Scene:
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object with {', '.join(SCENE_KEYS)}.")
    _check_keys(value, SCENE_KEYS, name)
    texts = {key: _text(value, key, name) for key in SCENE_KEYS}
    for key in ("prompt", "image_prompt"):
        if not texts[key]:
            raise UserError(f"{name} has no {key}; write what the {_what(key)} shows.")
    title = texts["title"] or texts["prompt"]
    return Scene(title=title[:MAX_TITLE].rstrip(), prompt=texts["prompt"], image_prompt=texts["image_prompt"])


def _what(key: str) -> str:
    return "clip" if key == "prompt" else "first frame"


def _text(value: dict, key: str, name: str) -> str:
    text = value.get(key, "")
    if not isinstance(text, str):
        raise UserError(f"{name}: {key} is {shown(text)}; it has to be a text.")
    if len(text) > PROMPT:
        raise UserError(f"{name}: {key} has {len(text):,} characters; at most {PROMPT:,} are allowed.")
    return clean(text)


def _check_keys(content: dict, known: tuple[str, ...], name: str) -> None:
    if unknown := [key for key in content if key not in known]:
        raise UserError(f"{name} has the unknown key {cut(unknown[0])!r}; known are {', '.join(known)}.")
