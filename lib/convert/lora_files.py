"""LoRA files from one layout to the other, each into a new folder with a report in it.

lora_to_diffusers(file, target=folder)      SAT LoRA -> lora.safetensors
lora_to_sat(file, target=folder)            and back
"""

import shutil
from contextlib import ExitStack
from pathlib import Path

from lib.convert import detect
from lib.convert.check import check_lora, check_sat
from lib.convert.locating import STATES
from lib.convert.lora import LoraJob, check_alpha, job_to_diffusers, job_to_sat
from lib.convert.planning import check_dtype
from lib.convert.report import Part, Report, write_report
from lib.convert.results import STEP, announce, open_source, progress_of, sat_usage, write_states
from lib.convert.writing import Report as Say
from lib.convert.writing import new_folder, require_room, write_safetensors
from lib.storage.archive import Stop

LORA_FILE = "lora.safetensors"


def lora_to_diffusers(
    source: Path,
    *,
    target: Path,
    alpha: float | None = None,
    dtype: str | None = None,
    report: Say = print,
    stop: Stop = None,
) -> Report:
    """Convert a SAT LoRA checkpoint into `target`/lora.safetensors, alpha / rank multiplied in.

    `alpha` is what it was trained with; SAT does not store it, and its default is 1 (CogVideo's own recipes
    for fine-tuning say 64 at rank 128). Raises UserError as to_diffusers does.
    """
    check_dtype(dtype)
    check_alpha(alpha)
    with new_folder(target) as folder, ExitStack() as opened:
        checkpoint = open_source(opened, source, folder / "work", stop)
        detect.require(detect.identify(checkpoint.tensors), "lora", "sat", name=checkpoint.name)
        job = job_to_diffusers(checkpoint, alpha=alpha, dtype=dtype)
        require_room(folder, job.planned)
        files = write_safetensors(
            folder,
            "lora",
            job.planned,
            progress_of("LoRA", job.planned, report, stop),
            shard_bytes=1 << 62,
            metadata=job.metadata,
        )
        opened.close()
        shutil.rmtree(folder / "work", ignore_errors=True)
        result = _lora_report(job, "to diffusers", alpha)
        result.parts[0].files, result.parts[0].checked = files, check_lora(folder / LORA_FILE, job.keys)
        write_report(result, folder, _lora_usage(result))
    announce(result, target, report)
    return result


def lora_to_sat(
    source: Path,
    *,
    target: Path,
    alpha: float | None = None,
    dtype: str | None = None,
    report: Say = print,
    stop: Stop = None,
) -> Report:
    """Convert a LoRA of diffusers into a SAT LoRA checkpoint that does the same with lora alpha `alpha`.

    Without `alpha` it is that of the SAT LoRA which the file came from, else SAT's default of 1. The folder
    holds `latest` and 1/mp_rank_00_model_states.pt. Raises UserError as to_diffusers does.
    """
    check_dtype(dtype)
    check_alpha(alpha)
    with new_folder(target) as folder, ExitStack() as opened:
        checkpoint = open_source(opened, source, folder / "work", stop)
        detect.require(detect.identify(checkpoint.tensors), "lora", "diffusers", name=checkpoint.name)
        job = job_to_sat(checkpoint, alpha=alpha, dtype=dtype)
        require_room(folder, job.planned)
        result = _lora_report(job, "to SAT", alpha)
        part = result.parts[0]
        part.files = write_states(folder, job.planned, progress_of("LoRA", job.planned, report, stop))
        opened.close()
        shutil.rmtree(folder / "work", ignore_errors=True)
        part.checked = check_sat(folder / STEP / STATES, "module", job.planned)
        write_report(result, folder, sat_usage(result))
    announce(result, target, report)
    return result


def _lora_report(job: LoraJob, direction: str, alpha: float | None) -> Report:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in job.planned})
    part = Part(
        name="lora",
        source=job.source,
        variant=job.label,
        tensors=len(job.planned),
        dtype=", ".join(dtypes),
        dropped=job.dropped,
    )
    result = Report(direction=direction, variant=job.label, family=job.family, parts=[part])
    result.settings = {"rank": job.rank, "alpha": job.alpha}
    if alpha is None and direction == "to diffusers":
        result.notes.append(
            f"alpha was not given: SAT stores none, and its default of {job.alpha:g} was used. CogVideo's "
            "own fine-tunes use 64 at rank 128."
        )
    return result


def _lora_usage(result: Report) -> str:
    rank, alpha = result.settings["rank"], result.settings["alpha"]
    return (
        '```python\npipe.load_lora_weights("lora.safetensors")\n```\n\nAt strength 1 it does what it did in '
        f"SAT with alpha {alpha:g}: alpha / rank, {alpha:g} / {rank}, is multiplied into the B matrices. Do "
        "not scale by it a second time. SAT does not store alpha; if the LoRA was trained with another one, "
        "convert it again with that."
    )
