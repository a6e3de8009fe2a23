"""What all conversions do alike: open a source, write SAT's layout of folders, say what was done."""

import itertools
from contextlib import ExitStack
from pathlib import Path

from lib.convert.locating import LATEST, SAT_VAE, STATES
from lib.convert.pickled import write_pickle
from lib.convert.reading import Checkpoint, open_checkpoint
from lib.convert.report import Report
from lib.convert.writing import Planned, Progress, Written
from lib.convert.writing import Report as Say
from lib.storage.archive import Stop

STEP = "1"


def write_states(folder: Path, planned: list[Planned], progress: Progress) -> dict[str, Written]:
    """Write {"module": ...} where SAT looks for it: `latest` and the step's folder."""
    (folder / STEP).mkdir()
    written = write_pickle(folder / STEP / STATES, "module", planned, progress)
    (folder / LATEST).write_text(STEP, encoding="utf-8")
    (folder / LATEST).chmod(0o644)
    return {f"{STEP}/{STATES}": written}


def progress_of(label: str, planned: list[Planned], report: Say, stop: Stop) -> Progress:
    """Progress over all tensors that are planned."""
    ends = list(itertools.accumulate(tensor.nbytes for tensor in planned))
    return Progress(label=label, total=ends[-1] if ends else 0, ends=ends, report=report, stop=stop)


def sat_usage(result: Report) -> str:
    """The README's part about how SAT loads the result."""
    lines = []
    for part in result.parts:
        if part.name == "vae":
            lines.append(
                f"`{SAT_VAE}` is the VAE: `ckpt_path` of `first_stage_config` in SAT's configuration."
            )
        else:
            lines.append("This folder is what `load` in SAT's configuration names.")
    if "alpha" in result.settings:
        rank, alpha = result.settings["rank"], result.settings["alpha"]
        lines.append(f"The LoRA has rank {rank} (`r`) and counts as it did with `lora_alpha` {alpha:g}.")
    else:
        lines.append(
            "SAT computes its tables of positions itself: they are not in the file. The text encoder is "
            "loaded from its own folder."
        )
    return "\n\n".join(lines)


def announce(result: Report, target: Path, report: Say) -> None:
    """Say what was done and where it is."""
    for line in result.lines():
        report(line)
    report(f"Done: {target}")


def open_source(opened: ExitStack, path: Path, work: Path, stop: Stop) -> Checkpoint:
    """open_checkpoint for as long as `opened` is open."""
    return opened.enter_context(open_checkpoint(Path(path), work=work, stop=stop))
