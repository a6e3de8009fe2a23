"""The components that no conversion makes: the text encoder and its tokenizer, taken over as they are."""

import os
import shutil
from pathlib import Path

from lib.errors import UserError
from lib.storage.disk import require_free_space
from lib.weights.shared_components import TEXT


def include_text_encoder(source: Path, folder: Path) -> list[str]:
    """Put text_encoder and tokenizer of a diffusers folder into another, as links where possible.

    Raises UserError when the source has not both.
    """
    source = Path(source)
    if missing := [part for part in TEXT if not (source / part).is_dir()]:
        raise UserError(
            f"{source} has no {' and no '.join(missing)}; give a folder of CogVideoX for diffusers."
        )
    for part in TEXT:
        (folder / part).mkdir()
        for file in sorted(path for path in (source / part).iterdir() if path.is_file()):
            _take(file.resolve(), folder / part / file.name)
    return list(TEXT)


def _take(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # on another disk, or one without hard links
        require_free_space(place.parent, file.stat().st_size)
        shutil.copyfile(file, place)
        place.chmod(0o644)
