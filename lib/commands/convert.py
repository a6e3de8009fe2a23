"""Converts on this machine: script/convert FILE [vae=FILE] [output=PATH] [setting=value ...]
or script/export-lora FILE [alpha=64] [output=PATH] [setting=value ...]

FILE is a checkpoint, a folder or archive of one, or an https:// address; vae= takes the same. The result
is the new folder output=PATH, by default beside FILE, called as it is with -diffusers or -sat behind. It gets
its name when it is whole; what is stopped or killed leaves nothing that would load, and the same command
begins again, with what a download has brought so far.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cancellation import Stopped
from lib.commands.common import FAILED, INTERRUPTED, MISUSED, help_status, stop_on_signals
from lib.errors import UserError
from lib.progress import LogView
from lib.serving.inputs import parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document

if TYPE_CHECKING:
    from lib.predictors.convert_files import Given

OUTPUT = "output"
ENDINGS = {"to_diffusers": "-diffusers", "to_sat": "-sat"}
LOCALLY = {
    ", up to 2 GiB": ", by its path or https:// address",
    "a zip or tar of the folder that it came in": "the folder that it came in, also as a zip or tar",
    "a zip or tar of its folder": "its folder, also as a zip or tar",
    "an archive of a diffusers folder": "a diffusers folder",
}
"""What the predictors' inputs say of uploads -> what is true of the commands."""


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
    document = settings_of(command)
    status = help_status(arguments, usage=command.usage, about=__doc__, document=document)
    if status is not None:
        return status
    stop, view = stop_on_signals("stopping"), LogView()
    try:
        pairs, output = _split(arguments, command)
        values = _defaults(document) | parse_inputs(pairs, document, send_files=False)
        run = _prepared(command, values, output)
    except UserError as error:
        print(error, file=sys.stderr)
        return MISUSED
    try:
        result = run(report=view.line, stop=stop)
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


def settings_of(command: Command) -> dict[str, Any]:
    """The predictor's inputs as its command takes them: for each checkpoint one, a path or an address."""
    document = input_document(PROJECT / command.predictor, name="Runner")
    properties = document["components"]["schemas"]["Input"]["properties"]
    for name in command.sources:
        del properties[f"{name}_url"], properties[name]["format"]
        for said, meant in LOCALLY.items():
            properties[name]["description"] = properties[name]["description"].replace(said, meant)
    return document


def _prepared(command: Command, values: dict[str, Any], output: Path | None) -> Callable[..., Path]:
    """What converts, once everything that is given was checked; it returns what the command prints.

    That is the folder, or the LoRA's file in it.
    """
    # For the help they are not needed.
    from lib.commands.convert_local import convert_lora, convert_model
    from lib.convert.request import lora_request, model_request
    from lib.network import offline

    offline.go_offline()
    given = [_given(values, name) for name in command.sources]
    if not any(given):
        raise UserError(f"no file, folder or address is given; usage: {command.usage}")
    target = _target(given, values["direction"], output)
    if command.predictor == COMMANDS["lora"].predictor:
        request = lora_request(values, has_lora=True)
        return partial(convert_lora, *given, request, target=target)
    transformer, vae = given
    request = model_request(values, has_transformer=bool(transformer), has_vae=bool(vae))
    return partial(convert_model, transformer, vae, request, target=target)


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
        elif any(pair.startswith(f"{first}=") for pair in pairs):
            raise UserError(f"{argument!r} is not setting=value; usage: {command.usage}")
        else:
            pairs.append(f"{first}={argument}")
    return pairs, output


def _defaults(document: dict[str, Any]) -> dict[str, Any]:
    properties = document["components"]["schemas"]["Input"]["properties"]
    return {name: shape.get("default") for name, shape in properties.items()}


def _given(values: dict[str, Any], name: str) -> "Given":
    """A checkpoint by its path or its address; the other settings stay in `values`."""
    from lib.predictors.convert_files import Given

    text = (values.pop(name) or "").removeprefix("@")
    if not text or "://" in text:
        return Given(slot=name, address=text)
    return Given(slot=name, upload=Path(text).expanduser())


def _target(given: "list[Given]", direction: str, output: Path | None) -> Path:
    """Where the result goes: beside the first checkpoint, or where the caller stands for an address."""
    if output is not None:
        return _plain(output)
    first = next(each for each in given if each)
    text = str(_plain(first.upload)) if first.upload else first.address
    path = Path(text.partition("?")[0].rstrip("/"))
    stem = path.name if path.is_dir() else path.name.removesuffix(path.suffix)
    folder = path.parent if "://" not in text else Path()
    return _plain(folder / f"{stem}{ENDINGS[direction]}")


def _plain(path: Path) -> Path:
    """The whole path without any `..` in it; what is a link itself stays one."""
    whole = path.absolute()
    return whole.resolve() if whole.name == ".." else whole.parent.resolve() / whole.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
