"""Fill .venv for script/setup, with only the standard library of Python 3.11 or later.

A lock admits one process at a time. A stamp file is written last; without it the next run starts over.
"""

import fcntl
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = {"base": ["requirements-local.txt"], "dev": ["requirements-dev.txt"]}
EXTRAS = VENV / "extras"
"""Only tests look here: diffusers would import an installed bitsandbytes at every start."""
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def main(kind: str, pins: dict[str, str]) -> int:
    """Install the requirements of `kind`, unless another process just has, and return the exit status.

    `pins` maps each kind to the checksum of its requirement files, which is what its stamp contains.
    """
    VENV.mkdir(exist_ok=True)
    with (VENV / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamps = {each: VENV / f".installed-{each}" for each in pins}
        usable = (VENV / "bin/python").exists() and any(stamp.exists() for stamp in stamps.values())
        for each, stamp in stamps.items():
            if stamp.exists() and stamp.read_text().strip() != pins[each]:
                stamp.unlink()
        if usable and stamps[kind].exists():
            return 0
        began = time.monotonic()
        say("installing the Python packages into .venv, once (a few minutes) ...")
        if not usable:
            make_environment()
        status = install(REQUIREMENTS[kind])
        if kind == "dev":
            status = status or install(
                ["requirements-extras.txt"], "--no-deps", "--upgrade", "--target", EXTRAS
            )
        if status:
            return status
        for each in ("base", "dev") if kind == "dev" else ("base",):
            partial = stamps[each].with_suffix(".partial")
            partial.write_text(pins[each] + "\n")
            os.replace(partial, stamps[each])
        say(f"installed in {time.monotonic() - began:.0f} s")
    return 0


def make_environment() -> None:
    """Create an empty environment. Removes the remains of an interrupted run, except for the lock."""
    for entry in VENV.iterdir():
        if entry.name != ".lock":
            subprocess.run(["rm", "-rf", str(entry)], check=True)
    venv.create(VENV, with_pip=True, symlinks=True)


def install(files: list[str], *options: str | Path) -> int:
    """Run pip and return its exit status. Prints its last lines if it fails."""
    command = [str(VENV / "bin/python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "-c", "constraints.txt", *map(str, options)]
    for file in files:
        command += ["-r", file]
    if os.environ.get("COGVIDEOX_TORCH") == "cpu":
        command += ["--extra-index-url", CPU_TORCH_INDEX]
    lines: list[str] = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        for line in pip.stdout:
            lines.append(line.rstrip())
            show_progress(lines[-1].strip())
    show_progress("")
    if pip.returncode:
        say("pip failed:\n" + "\n".join(lines[-30:]))
    return pip.returncode


def show_progress(line: str) -> None:
    """Show what pip is doing on one line that is overwritten, if this is a terminal."""
    if sys.stderr.isatty() and (not line or line.startswith(("Collecting", "Downloading", "Installing"))):
        sys.stderr.write(f"\r\x1b[K{line[:100]}")
        sys.stderr.flush()


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], {"base": sys.argv[2], "dev": sys.argv[3]}))
    except KeyboardInterrupt:
        say("interrupted; the next run starts from scratch")
        sys.exit(130)
