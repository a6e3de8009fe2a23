"""A predictor with an input of every kind, in a file."""

from pathlib import Path
from typing import Any

from lib.serving.schema import openapi_schema

PREDICTOR = """
from typing import Optional
from cog import BaseRunner, Input, Path
class Runner(BaseRunner):
    def run(
        self,
        prompt: str = Input(description="What to show.", default="a fox"),
        image: Path = Input(description="First frame."),
        steps: int = Input(description="Steps.", default=50, ge=1, le=500),
        scale: float = Input(description="Scale.", default=6, ge=1, le=20),
        loud: bool = Input(description="Loud.", default=False),
        seed: Optional[int] = Input(description="Seed.", default=None),
        fmt: str = Input(description="Format.", choices=["mp4", "gif"], default="mp4"),
        extras: Optional[list[Path]] = Input(description="More.", default=None),
    ) -> Path: ...
"""


def sample_document(folder: Path) -> dict[str, Any]:
    """Write the predictor into a folder and return its OpenAPI document."""
    file = folder / "predict_sample.py"
    file.write_text(PREDICTOR)
    return openapi_schema(file)
