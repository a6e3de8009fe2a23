"""The text encoder and tokenizer of a converted model, from the cache or downloaded.

All released CogVideoX models share the same T5-XXL; the rest of a released model is not downloaded for it.
"""

import threading
from pathlib import Path

from lib.convert import detect
from lib.convert.configs import FAMILIES
from lib.convert.lora import split_base
from lib.convert.planning import shapes_of
from lib.convert.reading import open_checkpoint
from lib.errors import UserError
from lib.models.specs import RELEASED_TEXT_ENCODER
from lib.network import hub
from lib.network.download import fetch_repository
from lib.network.offline import forbidden
from lib.network.transport import Rules
from lib.progress import Report
from lib.settings import current
from lib.storage.disk import link_or_copy
from lib.storage.lock import lock
from lib.weights import checkpoints, hub_model
from lib.weights.shared_components import TEXT, has_text_encoder

REVISION = "main"


def include_text_encoder(source: Path, folder: Path) -> list[str]:
    """Copy text_encoder and tokenizer of a diffusers folder into another, as hard links where possible.

    Raises UserError unless the source has both.
    """
    if missing := [part for part in TEXT if not (source / part).is_dir()]:
        raise UserError(f"{source} has no {' and no '.join(missing)}; give a CogVideoX folder of diffusers.")
    for part in TEXT:
        (folder / part).mkdir()
        for file in sorted(path for path in (source / part).iterdir() if path.is_file()):
            link_or_copy(file, folder / part / file.name)
    return list(TEXT)


def find_text_encoder(
    transformer: Path, family: str | None, *, report: Report = print, stop: threading.Event | None = None
) -> Path | None:
    """Return a folder whose text_encoder and tokenizer fit a SAT transformer; None when the file is not one.

    It is a downloaded model's, else the two are downloaded from the repository of the transformer's family.
    Raises UserError when the transformer was made for another width than the released text encoder's.
    """
    with open_checkpoint(transformer, stop=stop) as checkpoint:
        base, _ = split_base(checkpoint.tensors)
        found = detect.identify(base)
        if found.kind != "transformer" or found.layout != "sat":
            return None  # the conversion refuses it
        sizes = detect.transformer_sizes(shapes_of(base), name=checkpoint.name)
        spec = FAMILIES[detect.family_of(sizes, given=family)]
    width, released = sizes.text_embed_dim, RELEASED_TEXT_ENCODER["d_model"]
    for folder in checkpoints.downloaded():
        if has_text_encoder(folder, width):
            return folder
    if width != released or spec.repository is None:
        raise UserError(
            f"{checkpoint.name} was made for a text encoder of width {width}, but the released one has "
            f"{released}: text_encoder=true is not supported. Copy its own text encoder into the result."
        )
    return _download(spec.repository, report, stop)


def _download(repository: str, report: Report, stop: threading.Event | None) -> Path:
    final = current().cache / f"{repository.replace('/', '--')}@{REVISION}--text"
    if final.is_dir():
        return final
    if forbidden():
        raise UserError(
            f"The text encoder is not in {final.parent}, and HF_HUB_OFFLINE forbids the download; unset it "
            "once."
        )
    with lock(final, report, stop=stop):
        if final.is_dir():  # another process has downloaded it meanwhile
            return final
        listed = hub_model.snapshot(repository, REVISION).files
        files = [file for file in listed if file.path.partition("/")[0] in TEXT]
        headers = hub.operator_headers()
        fetch_repository(files, final, headers=headers, report=report, rules=Rules(stop=stop))
    return final
