"""Data sets to train on: clips of a shape that the embedded models do not know, with captions."""

import base64
import csv
import zipfile
from pathlib import Path

import numpy as np

from lib.video.writer import write_video
from tiny.world import BACKGROUNDS, EXTRA_COLOURS, FPS, FRAMES, HEIGHT, WIDTH, Scene, motion_path, render

GROUNDS = tuple(BACKGROUNDS)


def caption(index: int) -> str:
    return f"a magenta star circles on {GROUNDS[index % len(GROUNDS)]}"


def star_frames(index: int, *, frames: int = FRAMES) -> np.ndarray:
    """Render a magenta star moving in a circle, uint8 [frames, 48, 64, 3], varying with `index`."""
    rng = np.random.default_rng(index)
    middle = (WIDTH / 2 + rng.uniform(-6, 6), HEIGHT / 2 + rng.uniform(-3, 3))
    scene = Scene(
        shape="star",
        colour=EXTRA_COLOURS["magenta"],
        background=BACKGROUNDS[GROUNDS[index % len(GROUNDS)]],
        radius=10.0,
        path=motion_path("circling", middle, 18.0, frames),
    )
    return render(scene)


def write_clips(folder: Path, count: int = 4, *, frames: int = FRAMES) -> Path:
    """Write `count` clips with a caption file each; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        clip = folder / f"star-{index:03d}.mp4"
        write_video(star_frames(index, frames=frames), clip, fps=FPS, format="mp4", metadata={})
        clip.with_suffix(".txt").write_text(caption(index))
    return folder


def zip_of(folder: Path, archive: Path) -> Path:
    """Zip the files of a folder."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return archive


def zip_with(archive: Path, members: dict[str, bytes | int]) -> Path:
    """A compressed zip of these members, whatever their names; a number is so many zeros."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in members.items():
            with file.open(name, "w") as member:
                if isinstance(content, bytes):
                    member.write(content)
                    continue
                for start in range(0, content, 1 << 20):
                    member.write(bytes(min(1 << 20, content - start)))
    return archive


def data_uri(path: Path, kind: str = "application/zip") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def losses_in(text: str) -> list[float]:
    """The losses of a loss.csv's text; its steps must be 1, 2, 3, ..."""
    rows = list(csv.DictReader(text.splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]
