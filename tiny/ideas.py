"""Loose ideas of the synthetic world, in many words, with the scenes that they mean.

An idea is written as a person would: "something scarlet rolls to the right at night, then it sinks". Its
scenes are captions that tiny-t2v and tiny-i2v understand. An attribute that nobody names is that of the scene
before, or one of DEFAULT.
"""

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiny.captions import canonical_caption
from tiny.world import ALL_COMBINATIONS, Attributes

DEFAULT = Attributes(shape="circle", colour="red", background="white", motion="still")

WORDS = tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))
SHAPE_WORDS = WORDS["shape_words"]
COLOUR_WORDS = WORDS["colour_words"]
COLOUR_LIKENESS = WORDS["colour_likeness"]
GROUND_NOUNS = WORDS["ground_nouns"]
GROUND_PHRASES = WORDS["ground_phrases"]
ON = WORDS["on"]
GROUND_HEADINGS = WORDS["ground_headings"]
GO = WORDS["go"]
WAYS = WORDS["ways"]
UPRIGHT = WORDS["upright"]
STILL_VERBS = WORDS["still_verbs"]
STILL_WORDS = WORDS["still_words"]
NO_MOVES = WORDS["no_moves"]
ADJECTIVES = WORDS["adjectives"]
ADVERBS = WORDS["adverbs"]
OPENINGS = WORDS["openings"]
JUNK = WORDS["junk"]
THINGS = WORDS["things"]
CHANGES = WORDS["changes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Idea:
    """What a person asks for, and the scenes that it means."""

    text: str
    scenes: tuple[Attributes, ...]


def sample_idea(rng: np.random.Generator, parts: int) -> Idea:
    """Sample an idea of some parts, each a scene; later parts may leave out what stays the same."""
    scenes: list[Attributes] = []
    texts: list[str] = []
    for _ in range(parts):
        wanted = _pick(rng, ALL_COMBINATIONS)
        if scenes and rng.random() < 0.5:
            scene, text = _continued(rng, scenes[-1], wanted)
        else:
            scene, text = _described(rng, wanted, scenes[-1] if scenes else DEFAULT)
        scenes.append(scene)
        texts.append(text)
    return Idea(text=_finished(rng, _joined(rng, texts)), scenes=tuple(scenes))


def sample_terse(rng: np.random.Generator) -> Idea:
    """Sample a prompt of a few words: "red circle, left, black"."""
    scene = _pick(rng, ALL_COMBINATIONS)
    colour, shape = word(rng, COLOUR_WORDS[scene.colour]), word(rng, SHAPE_WORDS[scene.shape])
    subject = f"{colour} {shape}" if rng.random() < 0.8 else f"{shape}, {colour}"
    if scene.motion == "still":
        motion = word(rng, STILL_WORDS)
    else:
        motion = word(rng, WAYS[scene.motion])
        motion = f"{_gerund(word(rng, GO))} {motion}" if rng.random() < 0.3 else motion
    ground = word(rng, GROUND_NOUNS[scene.background]).removeprefix("a ").removeprefix("an ")
    if rng.random() < 0.3:
        ground = ground_phrase(rng, scene.background)
    places = [subject, motion, ground]
    if rng.random() < 0.4:
        rng.shuffle(places)
    text = _pick(rng, (", ", ", ", " ", "; ", " / ", " - ")).join(places)
    return Idea(text=_finished(rng, text), scenes=(scene,))


def storyboard_text(scenes: tuple[Attributes, ...]) -> str:
    """Return the writer's answer for scenes, as compact JSON."""
    written = [
        {
            "title": f"{scene.colour} {scene.shape} {scene.motion}",
            "prompt": canonical_caption(scene),
            "image_prompt": image_caption(scene),
        }
        for scene in scenes
    ]
    return json.dumps({"scenes": written}, separators=(",", ":"))


def image_caption(scene: Attributes) -> str:
    """Return what a scene's first frame shows."""
    return f"a {scene.colour} {scene.shape} on a {scene.background} background"


def _described(rng: np.random.Generator, wanted: Attributes, before: Attributes) -> tuple[Attributes, str]:
    """Return a scene and a text that says its attributes in any order.

    Now and then one of them is left out; it is then that of `before`.
    """
    if rng.random() < 0.12:
        return wanted, _headed(rng, wanted)
    left_out = _pick(rng, ("colour", "background", "motion")) if rng.random() < 0.1 else ""
    scene = dataclasses.replace(wanted, **{left_out: getattr(before, left_out)}) if left_out else wanted
    subject = _subject(rng, scene, with_colour=left_out != "colour")
    ground = "" if left_out == "background" else ground_phrase(rng, scene.background)
    if left_out == "motion":
        text = _pick(rng, (f"{subject} {ground}", f"{ground}, {subject}", f"{ground} is {subject}"))
        return scene, text.strip(" ,")
    return scene, _sentence(rng, subject, scene.motion, ground)


def _continued(rng: np.random.Generator, before: Attributes, wanted: Attributes) -> tuple[Attributes, str]:
    """Return the next scene of the same thing: with another motion, and perhaps another colour or ground."""
    scene = dataclasses.replace(before, motion=wanted.motion)
    if rng.random() < 0.3:
        scene = dataclasses.replace(scene, background=_pick(rng, (before.background, wanted.background)))
        return scene, _sentence(
            rng, _subject(rng, scene, with_colour=True), scene.motion, ground_phrase(rng, scene.background)
        )
    subject = _pick(rng, ("it", "it", f"the {word(rng, SHAPE_WORDS[before.shape])}", "the same one", "it"))
    ground = ""
    if rng.random() < 0.4:
        scene = dataclasses.replace(scene, background=wanted.background)
        ground = ground_phrase(rng, scene.background)
    if rng.random() < 0.4:
        scene = dataclasses.replace(scene, colour=wanted.colour)
        subject = f"{subject} {_pick(rng, CHANGES)} {word(rng, COLOUR_WORDS[scene.colour])} and"
        if rng.random() < 0.3:
            subject = f"the {word(rng, COLOUR_WORDS[scene.colour])} {word(rng, SHAPE_WORDS[before.shape])}"
    text = f"{subject} {_moving(rng, scene.motion)}"
    return scene, (f"{text} {ground}" if rng.random() < 0.7 or not ground else f"{ground} {text}").strip()


def _headed(rng: np.random.Generator, scene: Attributes) -> str:
    """Return a scene whose ground stands alone: "Fog. A red wheel rolls left."."""
    place = word(rng, GROUND_HEADINGS[scene.background])
    subject = _subject(rng, scene, with_colour=True)
    moves, moving = _moving(rng, scene.motion), _moving(rng, scene.motion, gerund=True)
    where = _pick(rng, WORDS["everywhere"])
    floor = _pick(rng, WORDS["floors"])
    noun = word(rng, GROUND_NOUNS[scene.background])
    shape, colour = word(rng, SHAPE_WORDS[scene.shape]), word(rng, COLOUR_WORDS[scene.colour])
    return _pick(
        rng,
        (
            f"{place}: {subject} {moves}",
            f"{place}. {subject} {moves}",
            f"{place}, {subject}, {moving}",
            f"{place}; {subject} {moving}",
            f"{subject} {moves}, {place} {where}",
            f"{subject} {moves}. {place} {where}",
            f"{subject} {moving}, {noun} {where}",
            f"{place} {where}. {subject} {moves}",
            f"{place} {where}, and {subject} {moves}",
            f"{noun}, and on it {subject} {moving}",
            f"{subject}. it {moves}. {place} {where}",
            f"{subject}, {place}, {moving}",
            f"the {shape} is {colour}, the {floor} is {scene.background}, it {moves}",
            f"the {shape} is {colour}, the background {noun}, and it {moves}",
            f"{place} is all there is; {subject} {moves}",
        ),
    )


def _sentence(rng: np.random.Generator, subject: str, motion: str, ground: str) -> str:
    ground = f" {ground}" if ground else ""
    if rng.random() < 0.2:
        return f"{subject} {_moving(rng, motion)}{ground}"
    place = ground.strip()
    moves, moving = _moving(rng, motion), _moving(rng, motion, gerund=True)
    forms = [
        f"{subject} {moves}{ground}",
        f"{subject} {moves}{ground}",
        f"{subject} {moving}{ground}",
        f"{subject}{ground} {moves}",
        f"{subject}{ground}, {moving}",
        f"{subject}, {moving},{ground}",
        f"{subject} that {moves}{ground}",
        f"watch {subject} as it {moves}{ground}",
        f"{subject} is seen{ground}; it {moves}",
        f"{subject}{ground}. it {moves}",
        f"{subject} which is {moving}{ground}",
        f"{moving}{ground}: {subject}",
        f"{moving}{ground}, {subject}",
    ]
    if place:
        forms += [
            f"{place} {subject} {moves}",
            f"{place}, {subject} {moves}",
            f"{place}, {subject} {moving}",
            f"{place} there is {subject} {moving}",
            f"{moving} {place}, {subject}",
            f"{place}: {subject}, {moving}",
            f"{subject} {moves}. the scene is {place}",
            f"{subject} {moves}. everything happens {place}",
            f"{place} one sees {subject} {moving}",
        ]
    done = f"{_pick(rng, WORDS['moved'])} {word(rng, WAYS[motion])}" if motion != "still" else ""
    if motion in WORDS["passive"]:
        done = word(rng, WORDS["passive"][motion])
    elif motion == "still":
        done = _pick(rng, WORDS["held"])
    forms += [
        f"{subject} is {done}{ground}",
        f"{subject} gets {done}{ground}",
        f"{subject}, {done}{ground}",
        f"{subject} {done}{ground}, it {moves}",
        f"{subject} {moves}{ground}, {_moving(rng, motion, gerund=True)}",
    ]
    if motion != "still":
        way = word(rng, WAYS[motion])
        verb = word(rng, GO)
        forms += [
            f"let {subject} {verb} {way}{ground}",
            f"{subject} is {_pick(rng, WORDS['moved'])} {way}{ground}",
            f"{subject} on its way {way}{ground}",
            f"{subject} makes its way {way}{ground}",
            f"{way} {_third(verb)} {subject}{ground}",
            f"someone {_pick(rng, ('pushes', 'pulls', 'drags', 'moves', 'slides'))} {subject} {way}{ground}",
            f"the wind blows {subject} {way}{ground}",
            f"{subject} wants to {verb} {way}{ground}",
        ]
    return _pick(rng, forms)


def _subject(rng: np.random.Generator, scene: Attributes, *, with_colour: bool) -> str:
    shape = word(rng, SHAPE_WORDS[scene.shape])
    colour = word(rng, COLOUR_WORDS[scene.colour])
    adjective = f"{_pick(rng, ADJECTIVES)} " if rng.random() < 0.25 else ""
    if not with_colour:
        return f"{_article(rng, adjective + shape)} {adjective}{shape}"
    likeness = word(rng, COLOUR_LIKENESS[scene.colour])
    formed = _pick(rng, WORDS["formed"][scene.shape])
    first = _article(rng, f"{adjective}{colour}")
    plain = f"{first} {adjective}{colour} {shape}"
    return _pick(
        rng,
        (
            *[plain] * 7,
            f"{_article(rng, colour)} {colour} and {formed} {_pick(rng, THINGS)}",
            f"{_article(rng, shape)} {shape}, {colour},",
            f"{_article(rng, shape)} {shape} in {colour}",
            f"{_article(rng, adjective + shape)} {adjective}{shape} painted {colour}",
            f"{_article(rng, shape)} {shape} the colour of {likeness}",
            f"{_article(rng, shape)} {shape} as {scene.colour} as {likeness}",
            f"{_article(rng, shape)} {colour}-looking {shape}",
            f"something {formed} and {colour}",
            f"something {colour} and {formed}",
            f"something {formed} the colour of {likeness}",
            f"{_article(rng, formed)} {formed} {_pick(rng, THINGS)} in {colour}",
            f"{_article(rng, colour)} {colour} {formed} {_pick(rng, THINGS)}",
            f"{_article(rng, shape)} {shape} that is {colour}",
            f"{_article(rng, shape)} {shape} coloured like {likeness}",
            f"{_article(rng, shape)} {shape} of {colour} {_pick(rng, WORDS['stuff'])}",
            f"the {shape}, which is {colour},",
        ),
    )


def ground_phrase(rng: np.random.Generator, background: str) -> str:
    noun = word(rng, GROUND_NOUNS[background])
    plain = noun.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    on = f"{_pick(rng, ON)} {noun}"
    return _pick(
        rng,
        (
            on, on, on,
            *[word(rng, GROUND_PHRASES[background])] * 3,
            f"with {noun} behind it",
            f"with {noun} as the background",
            f"the background is {plain}",
            f"with {noun} all around",
            f"on {_pick(rng, ('plain', 'solid', 'nothing but', 'flat'))} {plain}",
            f"in {_pick(rng, ('a world of', 'a room full of', 'a place of', 'the middle of'))} {plain}",
            f"where all is {background}",
            f"on a {background} {_pick(rng, WORDS['floors'])}",
        ),
    )  # fmt: skip


def _moving(rng: np.random.Generator, motion: str, *, gerund: bool = False) -> str:
    """Return a predicate ("slowly rolls to the left"), or the same as a participle."""
    adverb = f"{_pick(rng, ADVERBS)} " if rng.random() < 0.2 else ""
    if motion == "still":
        if gerund:
            return word(rng, STILL_WORDS)
        verb = _third(word(rng, STILL_VERBS))
        return _pick(
            rng, (verb, verb, word(rng, NO_MOVES), f"is {word(rng, STILL_WORDS)}", f"{adverb}{verb}")
        )
    inflect = _gerund if gerund else _third
    if motion in UPRIGHT and rng.random() < 0.5:
        verb = inflect(word(rng, UPRIGHT[motion]))
        return f"{adverb}{verb}" if rng.random() < 0.7 else f"{verb} {word(rng, WAYS[motion])}"
    text = f"{inflect(word(rng, GO))} {word(rng, WAYS[motion])}"
    return f"{adverb}{text}" if rng.random() < 0.7 else f"{text} {adverb}".strip()


def _joined(rng: np.random.Generator, parts: list[str]) -> str:
    if len(parts) == 1:
        opening = _pick(rng, OPENINGS) if rng.random() < 0.4 else ""
        return opening + parts[0]
    kind = rng.random()
    if kind < 0.2:
        mark, between = _pick(rng, WORDS["numbered"])
        return between.join(mark.format(number) + part for number, part in enumerate(parts, start=1))
    if kind < 0.27:
        return "\n".join(f"- {part}" for part in parts)
    if kind < 0.34:
        return _pick(rng, (" -> ", " / ", "\n", " | ", "; ")).join(parts)
    if kind < 0.5:
        words = ("first", "second", "third", "fourth")
        if rng.random() < 0.6:
            middle = [_pick(rng, ("then", "next", "after that", "afterwards")) for _ in parts[2:]]
            words = ("first", *middle, _pick(rng, WORDS["last"]))
        comma, stop = _pick(rng, ((", ", ". "), (" ", ", "), (", ", "; "), (" ", ". ")))
        return stop.join(f"{word}{comma}{part}" for word, part in zip(words, parts, strict=False))
    if len(parts) == 2 and kind < 0.56:
        return f"after {parts[0]}, {parts[1]}"
    text = parts[0]
    for part in parts[1:]:
        text += _pick(rng, WORDS["then"]) + part
    return text


def _finished(rng: np.random.Generator, text: str) -> str:
    """Put words that mean nothing in, capitals, and marks at the end."""
    words = text.split(" ")
    if rng.random() < 0.25:
        for _ in range(int(rng.integers(1, 4))):
            place = (
                int(rng.choice([0, len(words)])) if rng.random() < 0.7 else int(rng.integers(len(words) + 1))
            )
            words.insert(place, _pick(rng, JUNK))
    text = " ".join(words).replace(" ,", ",").replace(",,", ",").replace(",.", ".").replace(",;", ";")
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    kind = rng.random()
    if kind < 0.4:
        text = text[:1].upper() + text[1:]
    elif kind < 0.5:
        text = ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))
    elif kind < 0.53:
        text = text.title()
    elif kind < 0.57:
        text = text.upper()
    return text + _pick(rng, ("", "", ".", ".", "!", " please", ", minimal style"))


def _article(rng: np.random.Generator, following: str) -> str:
    kind = rng.random()
    if kind < 0.15:
        return "the"
    if kind < 0.22:
        return "one"
    return "an" if following[:1] in "aeiou" else "a"


def _third(verb: str) -> str:
    first, _, rest = verb.partition(" ")
    if first.endswith(("s", "sh", "ch", "x", "z", "o")):
        first += "es"
    elif first.endswith("y") and first[-2] not in "aeiou":
        first = first[:-1] + "ies"
    else:
        first += "s"
    return f"{first} {rest}".strip()


def _gerund(verb: str) -> str:
    first, _, rest = verb.partition(" ")
    doubled = {
        "run",
        "swim",
        "slip",
        "hop",
        "skid",
        "spin",
        "drop",
        "dip",
        "sit",
        "stop",
        "trot",
        "flit",
        "plan",
        "set",
    }
    if first in doubled:
        first += first[-1]
    elif first == "lie":
        first = "ly"
    elif first.endswith("e") and not first.endswith(("ee", "oe")):
        first = first[:-1]
    return f"{first}ing {rest}".strip()


def word(rng: np.random.Generator, words: list[str]) -> str:
    """Pick one; in a quarter of all cases among the first, which are the usual ones."""
    return _pick(rng, words[:6] if rng.random() < 0.25 else words)


def _pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]
