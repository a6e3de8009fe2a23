"""Packages that only some settings need: asked for by name, never imported to find out."""

from importlib.util import find_spec

from lib.errors import UserError


def available(package: str) -> bool:
    """Whether it is installed."""
    return find_spec(package) is not None


def require(package: str, *, for_setting: str, install: str | None = None) -> None:
    """Raise UserError, with what to install, unless it is there; `install` where PyPI calls it otherwise."""
    if not available(package):
        name = install or package
        raise UserError(
            f"{for_setting} needs {name}, which is not installed: "
            f"pip install {name}, or add a line with it to requirements.txt for an image."
        )
