"""The files of a Hub repository that a model needs."""

import re
from dataclasses import replace
from pathlib import PurePosixPath

from lib.errors import UserError
from lib.models.layout import INDEX
from lib.network.hub import Snapshot, listing, operator_headers

FOLDERS = frozenset({"scheduler", "text_encoder", "tokenizer", "transformer", "vae"})
# Configurations, weights, vocabularies, licences. Neither code nor pickles: nothing loads them.
SUFFIXES = frozenset({".json", ".safetensors", ".model", ".txt"})
# How diffusers and transformers name weights, their variants ("fp16"), and the indices of both.
SHARDED = r"(?:-\d{5}-of-\d{5})?"
PLAIN = re.compile(rf"(?P<stem>[^.]+?){SHARDED}\.safetensors")
VARIANT = re.compile(
    rf"(?P<stem>[^.]+?){SHARDED}\.[\w-]+\.safetensors(?:\.index\.json)?"
    r"|(?P<indexed>[^.]+)\.safetensors\.index\.[\w-]+\.json"
)


def snapshot(repository: str, revision: str) -> Snapshot:
    """Resolve a revision and list the model's files. Raises UserError when the repository holds no model."""
    complete = listing(repository, revision, headers=operator_headers())
    wanted = _wanted([file.path for file in complete.files], repository)
    return replace(complete, files=tuple(file for file in complete.files if file.path in wanted))


def _wanted(paths: list[str], repository: str) -> set[str]:
    """Return the files of the diffusers layout, or without its index those of a transformers model."""
    places = [PurePosixPath(path) for path in paths]
    if any(place.is_absolute() or ".." in place.parts for place in places):
        raise UserError(f"{repository} lists a file outside itself; it is refused.")
    known = [place for place in places if place.suffix in SUFFIXES or place.name.startswith("LICENSE")]
    root = [place for place in known if len(place.parts) == 1]
    if INDEX in paths:
        chosen = [place for place in known if len(place.parts) == 2 and place.parts[0] in FOLDERS]
        chosen += [place for place in root if place.name == INDEX or place.name.startswith("LICENSE")]
    else:
        chosen = root
    chosen = _without_variants(chosen)
    if not any(place.suffix == ".safetensors" for place in chosen) or not {INDEX, "config.json"} & set(paths):
        raise UserError(
            f"{repository} on the Hub is not a model that can be loaded here: it needs {INDEX} and "
            "safetensors weights in the diffusers layout. For a SAT checkpoint "
            "script/convert, or the predictor predict_convert, makes such a folder."
        )
    return {str(place) for place in chosen}


def _without_variants(places: list[PurePosixPath]) -> list[PurePosixPath]:
    """Drop weights such as NAME.fp16.safetensors where NAME.safetensors exists, sharded or not."""
    plain = {(place.parent, match["stem"]) for place in places if (match := PLAIN.fullmatch(place.name))}
    variants = {
        place
        for place in places
        if (match := VARIANT.fullmatch(place.name))
        and (place.parent, match["stem"] or match["indexed"]) in plain
    }
    return [place for place in places if place not in variants]
