"""Captions a data set on this machine: script/caption FOLDER [setting=value ...]

A folder gets its captions in place: a .txt beside each clip, metadata.jsonl (which counts where both are
there), prompts.txt and videos.txt; what is there stays. With output_dir=PATH, which an archive (zip or tar)
needs, all of it goes to a folder of its own, with the clips unless include_videos=false.
On several GPUs: accelerate launch --multi_gpu --num_processes 2 -m lib.caption FOLDER ...
The same command again goes on where one was stopped (captions.jsonl says what is done).
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

from lib.cancellation import Stopped
from lib.caption.place import Place, settled_place
from lib.commands.common import FAILED, INTERRUPTED, MISUSED, help_status, stop_on_signals
from lib.distributed.launched import FirstFailedError, Processes
from lib.errors import UserError
from lib.progress import LogView, Report
from lib.serving.inputs import parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import training_inputs

USAGE = "script/caption FOLDER_OR_ARCHIVE [output_dir=PATH] [setting=value ...]"
SOURCE, OUTPUT_DIR = "input_videos", "output_dir"


def main(arguments: list[str]) -> int:
    """The exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    document = _settings()
    status = help_status(arguments, usage=USAGE, about=__doc__, document=document)
    if status is not None:
        return status
    rank = int(os.environ.get("RANK", "0"))
    first = rank == 0
    stop = stop_on_signals("stopping" if first else "")
    view = LogView()
    status = MISUSED
    try:
        values = parse_inputs(_pairs(arguments), document, send_files=False)
        status = FAILED
        place = _place(values.pop(SOURCE), values.pop(OUTPUT_DIR, ""))
    except UserError as error:
        if first:  # the others are told the same
            print(error, file=sys.stderr)
        return status
    try:
        result = _run(place, values, stop, view.line if first else _silent)
    except UserError as error:
        view.close()
        print(error if first else f"process {rank}: {error}", file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        view.close()
        if first:
            print("stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    view.close()
    if first and result is not None:
        print(result)
    return 0 if result is not None else FAILED


def _settings() -> dict[str, Any]:
    """The predictor's inputs as this command takes them: a folder too, and a place for the captions."""
    document = training_inputs(PROJECT / "predict_caption_dataset.py", name="Runner")
    properties = document["components"]["schemas"]["Input"]["properties"]
    properties[SOURCE] = {
        "type": "string",
        "x-order": 0,
        "description": properties[SOURCE]["description"].replace("Zip or tar", "Folder, zip or tar"),
    }
    properties[OUTPUT_DIR] = {
        "type": "string",
        "x-order": 0,
        "default": "",
        "description": "Where captions and clips go. Empty: captions beside the clips. An archive needs it.",
    }
    return document


def _place(source: str, output: str) -> Place:
    """Raises UserError where the data set is none of this machine's, or captions would be in the way."""
    from lib.predictors.input_files import check_file

    if "://" in source:
        raise UserError(f"{source} is an address; give a folder, zip or tar on this machine.")
    clips = check_file(Path(source.removeprefix("@")).expanduser())
    return settled_place(clips, Path(output).expanduser() if output else None)


def _run(place: Place, values: dict[str, Any], stop: threading.Event, report: Report) -> Path | None:
    """The folder of captions; None where another process tells why there are none."""
    processes = Processes()
    try:
        from lib.commands.caption_local import (
            caption_dataset,  # torch comes in only for a command that can be run
        )

        return caption_dataset(place, values, processes=processes, stop=stop, report=report)
    except FirstFailedError:
        return None
    finally:
        processes.leave()


def _pairs(arguments: list[str]) -> list[str]:
    """All settings, the data set among them."""
    pairs: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name.isidentifier():
            pairs.append(argument)
        elif any(pair.startswith(f"{SOURCE}=") for pair in pairs):
            raise UserError(f"{argument!r} is not setting=value; usage: {USAGE}")
        else:
            pairs.append(f"{SOURCE}={argument}")
    if not any(pair.startswith(f"{SOURCE}=") for pair in pairs):
        raise UserError(f"no folder or archive is given; usage: {USAGE}")
    return pairs


def _silent(line: str) -> None:
    """What every process would say, the first says."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
