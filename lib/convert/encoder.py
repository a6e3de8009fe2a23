"""The released text encoder and tokenizer, for results that are to be whole: from the cache or downloaded.

All released CogVideoX models have the same T5-XXL; the rest of a released model is not downloaded for it.
"""

import os
from pathlib import Path

from lib.cancellation import check_stop
from lib.convert import detect
from lib.convert.configs import family_named
from lib.convert.lora import split_base
from lib.convert.reading import open_checkpoint
from lib.errors import UserError
from lib.network import hub
from lib.network.download import fetch
from lib.network.offline import forbidden
from lib.network.transport import Rules
from lib.progress import Report
from lib.storage.archive import Stop
from lib.storage.disk import require_free_space
from lib.storage.lock import lock
from lib.weights import checkpoints, hub_model
from lib.weights.cache import cache_folder
from lib.weights.shared_components import TEXT, has_text_encoder

WIDTH = 4096
"""Of the released text encoder's output."""
REVISION = "main"


def encoder_for(
    transformer: Path, family: str | None, *, work: Path, report: Report = print, stop: Stop = None
) -> Path | None:
    """A folder whose text_encoder and tokenizer fit a SAT transformer; None when the file is none.

    It is that of a downloaded model, else the two are downloaded from the repository of its family. Raises
    UserError when the released text encoder has another width than the transformer was made for.
    """
    with open_checkpoint(transformer, work=work, stop=stop) as checkpoint:
        base, _ = split_base(checkpoint.tensors)
        if detect.identify(base).kind != "transformer" or detect.identify(base).layout != "sat":
            return None  # the conversion says what it is
        shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
        sizes = detect.transformer_sizes(shapes, name=checkpoint.name)
        width, kind = sizes.text_embed_dim, detect.family_of(sizes, given=family)
    found = next((folder for folder in checkpoints.downloaded() if has_text_encoder(folder, width)), None)
    if found is not None:
        return found
    if width != WIDTH:
        raise UserError(
            f"{checkpoint.name} was made for a text encoder of width {width}, and the released one has "
            f"{WIDTH}: text_encoder=true is not possible. Put its own into the result."
        )
    return _downloaded(family_named(kind).repository, report, stop)


def _downloaded(repository: str, report: Report, stop: Stop) -> Path:
    final = cache_folder() / f"{repository.replace('/', '--')}@{REVISION}--text"
    if final.is_dir():
        return final
    if forbidden():
        raise UserError(
            f"The text encoder is not in {final.parent}, and HF_HUB_OFFLINE forbids to download it; unset it "
            "once."
        )
    with lock(final, report, stop=stop):
        if final.is_dir():  # another process was faster
            return final
        listed = hub_model.snapshot(repository, REVISION).files
        files = [file for file in listed if file.path.partition("/")[0] in TEXT]
        work = final.with_name(final.name + ".partial")
        require_free_space(work, sum(file.size or 0 for file in files if not (work / file.path).exists()))
        for file in files:
            check_stop(stop)
            fetch(file.url, work / file.path, size=file.size, sha256=file.sha256, headers=hub.headers(),
                  report=report, rules=Rules(stop=stop))  # fmt: skip
        os.replace(work, final)
    return final
