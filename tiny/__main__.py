"""Train the embedded models: `script/tiny all`, or one stage at a time.

Stages, each resumable from runs/tiny: vae, t2v, i2v, decoder, caption, writer, painter-vae, painter, export.
"""

import argparse
import os
from pathlib import Path

from tiny import loop
from tiny.export import export
from tiny.train_captioner import train_captioner
from tiny.train_decoder import train_decoder
from tiny.train_painter import train_painter, train_painter_vae
from tiny.train_transformer import train_transformer
from tiny.train_vae import train_vae
from tiny.train_writer import train_writer

STAGES = ["vae", "t2v", "i2v", "decoder", "caption", "writer", "painter-vae", "painter", "export", "all"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/tiny", description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=2600)
    parser.add_argument("--t2v-steps", type=int, default=9500)
    parser.add_argument("--i2v-steps", type=int, default=2300)
    parser.add_argument("--decoder-steps", type=int, default=5500)
    parser.add_argument("--caption-steps", type=int, default=3000)
    parser.add_argument("--writer-steps", type=int, default=3000)
    parser.add_argument("--painter-vae-steps", type=int, default=1500)
    parser.add_argument("--painter-steps", type=int, default=7000)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.stage in ("vae", "all"):
        loop.launch(train_vae, options.processes, options.folder, options.vae_steps, options.seed)
    for task, steps in (("t2v", options.t2v_steps), ("i2v", options.i2v_steps)):
        if options.stage in (task, "all"):
            loop.launch(train_transformer, options.processes, options.folder, task, steps, options.seed)
    if options.stage in ("decoder", "all"):
        loop.launch(train_decoder, options.processes, options.folder, options.decoder_steps, options.seed)
    if options.stage in ("caption", "all"):
        loop.launch(train_captioner, options.processes, options.folder, options.caption_steps, options.seed)
    for stage, train, steps in (
        ("writer", train_writer, options.writer_steps),
        ("painter-vae", train_painter_vae, options.painter_vae_steps),
        ("painter", train_painter, options.painter_steps),
    ):
        if options.stage in (stage, "all"):
            loop.launch(train, options.processes, options.folder, steps, options.seed)
    if options.stage in ("export", "all"):
        export(options.folder, Path("weights"))


if __name__ == "__main__":
    main()
