"""Run the HTTP server in the foreground, until Ctrl-C: script/serve NAME --port 5000."""

import argparse
import json
import shlex
import sys
from typing import Any

from lib.commands.common import EXAMPLE_PROMPT, checking_arguments, run_command
from lib.errors import UserError
from lib.serving.backend import ServerError
from lib.serving.inputs import input_properties
from lib.serving.registry import find_predictor, predictors
from lib.serving.server import Server
from lib.settings import current

TRAINING_EXAMPLE = (
    "curl -s {}/trainings{} -H 'Content-Type: application/json' "
    """-d '{{"input": {{"input_videos": "https://example.org/clips.zip"}}}}'"""
)
EXAMPLE_FILES = {"video": ("video.mp4", "video/mp4"), "input_videos": ("clips.zip", "application/zip")}
"""File and its type by the input that it is for; other inputs are images."""
FILE_PLACE = "@FILE@"


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    return run_command(_serve, arguments)


def _serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="script/serve", description="Runs the HTTP server in the foreground."
    )
    parser.add_argument("name", help=f"one of: {', '.join(predictors())}")
    parser.add_argument("--port", type=int, default=5000, help="default 5000")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    parser.add_argument("--train", action="store_true", help="serve POST /trainings in place of predictions")
    given = parser.parse_args(arguments)
    with checking_arguments():
        if not 0 < given.port < 65536:
            raise UserError(f"--port {given.port} is out of range: 1 to 65535")
        config = find_predictor(given.name)
        if given.train and config.train is None:
            trainable = [name for name, each in predictors().items() if each.train is not None]
            raise UserError(f"{config.name} has no training; those that have: {', '.join(trainable)}")
    options = {"host": given.host, "port": given.port, "prediction_logs": True}
    try:
        with Server(config, mode="train" if given.train else "predict", **options) as server:
            if given.train:
                what, example = "training", TRAINING_EXAMPLE.format(server.url, token_header())
            else:
                what, example = config.name, curl_example(server.url, config.openapi())
            print(f"{what} is ready at {server.url} (Ctrl-C stops it). Try:\n{example}", file=sys.stderr)
            raise ServerError(server.wait())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0


def curl_example(url: str, document: dict[str, Any]) -> str:
    """Return a command that sends every required input; files are sent as data URIs.

    Where nothing is required but one of several files is, the address of the first is sent.
    """
    shapes = input_properties(document)
    required = document["components"]["schemas"]["Input"].get("required", [])
    asks_about_files = shapes.keys() & {"video", "input_videos"}
    inputs = {"prompt": EXAMPLE_PROMPT} if "prompt" in shapes and not asks_about_files else {}
    inputs |= {name: _example_value(name, shapes[name]) for name in required}
    address = next((name for name in shapes if name.endswith("_url")), None)
    inputs |= {address: f"https://example.org/{address.removesuffix('_url')}.pt"} if address else {}
    body = json.dumps({"input": inputs})
    curl = f"curl -s {url}/predictions{token_header()} -H 'Content-Type: application/json' -d"
    files = [_example_file(name)[0] for name in required if shapes[name].get("format") == "uri"]
    if not files:
        return f"{curl} {shlex.quote(body)}"
    # Through a pipe: an argument may not be longer than 128 KiB, except for the shell's own printf.
    template = body.replace("\\", "\\\\").replace("%", "%%").replace(FILE_PLACE, "%s")
    contents = " ".join(f'"$(base64 -w0 {name})"' for name in files)
    return f"printf {shlex.quote(template)} {contents} | {curl} @-"


def token_header() -> str:
    """Return the option of curl that sends the token, where this server needs one. It does not show it."""
    return ' -H "Authorization: Bearer $COGVIDEOX_API_TOKEN"' if current().api_token else ""


def _example_file(name: str) -> tuple[str, str]:
    return EXAMPLE_FILES.get(name, (f"{name}.png", "image/png"))


def _example_value(name: str, shape: dict[str, Any]) -> Any:
    if "enum" in shape:
        return shape["enum"][0]
    if shape.get("format") == "uri":
        return f"data:{_example_file(name)[1]};base64,{FILE_PLACE}"
    least = shape.get("minimum", 1)
    return {"integer": least, "number": least, "boolean": True}.get(shape["type"], "text")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
