"""Converts on this machine: script/convert FILE [vae=FILE] [output=PATH] [setting=value ...]
or script/export-lora FILE [alpha=64] [output=PATH] [setting=value ...]

FILE is a checkpoint, a folder or archive of one, or an https:// address; vae= takes the same. The result
is the new folder output=PATH, by default beside FILE, called as it is with -diffusers or -sat behind. It gets
its name when it is whole; what is stopped or killed leaves nothing that would load, and the same command
begins again, with what a download has brought so far.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.command import FAILED, INTERRUPTED, MISUSED, begin, help_status
from lib.compute import Stopped
from lib.errors import UserError
from lib.serving.configs import PROJECT
from lib.serving.inputs import parse_inputs
from lib.serving.progress import LogView
from lib.serving.schema import training_inputs

OUTPUT = "output"
ENDINGS = {"to_diffusers": "-diffusers", "to_sat": "-sat"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One of the two scripts: the predictor whose settings it has, and which of them are checkpoints."""

    script: str
    predictor: str
    sources: tuple[str, ...]
    """The first is what is given without a name."""

    @property
    def usage(self) -> str:
        others = "".join(f" [{name}=FILE]" for name in self.sources[1:])
        return f"{self.script} FILE_FOLDER_OR_ADDRESS{others} [output=PATH] [setting=value ...]"


COMMANDS = {
    "model": Command(script="script/convert", predictor="predict_convert.py", sources=("transformer", "vae")),
    "lora": Command(script="script/export-lora", predictor="predict_export_lora.py", sources=("lora",)),
}


def main(arguments: list[str]) -> int:
    """The exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    command, arguments = COMMANDS[arguments[0]], arguments[1:]
    document = training_inputs(PROJECT / command.predictor, name="Runner")
    status = help_status(arguments, usage=command.usage, about=__doc__, document=document)
    if status is not None:
        return status
    stop, view = begin("stopping"), LogView()
    try:
        pairs, output = _split(arguments, command)
        values = _defaults(document) | parse_inputs(pairs, document, send_files=False)
        for name in command.sources:
            _separate_address(values, name)
    except UserError as error:
        print(error, file=sys.stderr)
        return MISUSED
    try:
        result = _run(command, values, output, stop, view.line)
    except UserError as error:
        view.close()
        print(error, file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        view.close()
        print("stopped; the same command begins again", file=sys.stderr)
        return INTERRUPTED
    view.close()
    print(result)
    return 0


def _run(
    command: Command,
    values: dict[str, Any],
    output: Path | None,
    stop: threading.Event,
    report: Callable[[str], None],
) -> Path:
    """Convert into the folder; what the command prints: the folder, or the LoRA's file in it."""
    # torch comes in only for a command that can be run
    from lib import offline
    from lib.convert.brought import Given
    from lib.convert.local import convert_lora, convert_model

    offline.go_offline()
    given = [
        Given(slot=name, upload=values.pop(name), address=values.pop(f"{name}_url"))
        for name in command.sources
    ]
    target = _target(given, values["direction"], output)
    convert = convert_model if command.predictor == COMMANDS["model"].predictor else convert_lora
    return convert(*given, values, target=target, report=report, stop=stop)


def _split(arguments: list[str], command: Command) -> tuple[list[str], Path | None]:
    """The settings, the checkpoints among them, and the output folder if one is given."""
    pairs: list[str] = []
    output = None
    first = command.sources[0]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == OUTPUT and equals:
            output = Path(value).expanduser() if value else None
        elif equals and name.isidentifier():
            pairs.append(argument)
        elif any(pair.startswith((f"{first}=", f"{first}_url=")) for pair in pairs):
            raise UserError(f"{argument!r} is not setting=value; usage: {command.usage}")
        else:
            pairs.append(f"{first}={argument}")
    return pairs, output


def _defaults(document: dict[str, Any]) -> dict[str, Any]:
    properties = document["components"]["schemas"]["Input"]["properties"]
    return {name: shape.get("default") for name, shape in properties.items()}


def _separate_address(values: dict[str, Any], name: str) -> None:
    """A path, or an address, whichever input it was given as."""
    text = values[name]
    if text is None:
        return
    if "://" in text:
        if values[f"{name}_url"]:
            raise UserError(f"Give {name} or {name}_url, not both.")
        values[name], values[f"{name}_url"] = None, text
    else:
        values[name] = Path(text).expanduser()


def _target(given: list[Any], direction: str, output: Path | None) -> Path:
    """Where the result goes: beside the first checkpoint, or where the caller stands for an address."""
    if output is not None:
        return output.absolute()
    first = next((each for each in given if each), None)
    if first is None:
        return Path("converted").absolute()  # the request is refused before anything is made
    text = str(first.upload.absolute()) if first.upload else first.address
    path = Path(text.partition("?")[0].rstrip("/"))
    stem = path.name if path.is_dir() else path.name.removesuffix(path.suffix)
    folder = path.parent if "://" not in text else Path()
    return (folder / f"{stem}{ENDINGS[direction]}").absolute()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
