"""Whether a LoRA learns: train on twenty clips of a concept that tiny-i2v does not know, and judge it.

    script/bench learning [--steps 1200] [--guidance 2] [--sheet FOLDER]

Prints how often the judge finds the new concept, on first frames and prompts that were not trained, with and
without the LoRA; the distance from the base at five strengths; and how well the old concepts survive.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lib.lora.attach import Loras
from lib.lora.source import Choice, parse
from tiny import concept
from tiny.evaluate import evaluate, load_generator, summarise
from training.config import TrainingConfig
from training.trainer import train

ROOT = Path(__file__).resolve().parent.parent
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SETTINGS = {
    "rank": 32,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "train_batch_size": 8,
    "caption_dropout": 0.05,
    "prior_preservation": 0.3,
    "prior_prompts": ":::".join(concept.PRIOR_PROMPTS),
    "checkpointing_steps": 200,
    "seed": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench learning", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--inference-steps", type=int, default=50)
    parser.add_argument("--clips", type=int, default=20, help="to judge of the new concept")
    parser.add_argument("--old", type=int, default=40, help="to judge of the old ones")
    parser.add_argument("--base", type=Path, default=ROOT / "weights" / "tiny-i2v")
    parser.add_argument("--lora", type=Path, help="judge this one instead of training")
    parser.add_argument("--sheet", type=Path, help="folder for a contact sheet")
    options = parser.parse_args()
    os.environ["COGVIDEOX_LOCAL_SOURCES"] = "1"
    os.environ["COGVIDEOX_MODEL"] = str(options.base)
    with tempfile.TemporaryDirectory() as folder:
        file = options.lora or trained(Path(folder), options.steps)
        show(file, options)


def trained(folder: Path, steps: int) -> Path:
    """Train on twenty clips and return the LoRA."""
    clips = concept.write_concept_clips(folder / "clips", 20)
    config = TrainingConfig.from_inputs(input_videos=str(clips), max_train_steps=steps, **SETTINGS)
    began = time.perf_counter()
    result = train(config, folder / "run", report=lambda line: None)
    print(f"trained {steps} steps in {time.perf_counter() - began:.0f} s", flush=True)
    return result / "lora.safetensors"


def show(file: Path, options: argparse.Namespace) -> None:
    """Judge the base, then the LoRA at every strength."""
    settings = {"guidance_scale": options.guidance, "num_inference_steps": options.inference_steps}
    generator = load_generator(options.base)
    loras = Loras(pipeline=generator.pipeline, spec=generator.spec, report=lambda line: None)
    address = parse(str(file.resolve()))

    def at(strength: float):
        return loras.applied([Choice(address=address, scale=strength)])

    def new() -> tuple[np.ndarray, float]:
        clips, right = zip(*concept.generate_concept(generator, options.clips, **settings), strict=True)
        return np.stack(clips), float(np.mean(right))

    def old() -> float:
        held_out = options.old // 3
        results = evaluate(generator, "i2v", trained=options.old - held_out, held_out=held_out, **settings)
        return summarise(list(results))["all four"]

    base, base_success = new()
    base_old = old()
    print(f"base: new concept {base_success:.0%}, old concepts {base_old:.0%}", flush=True)
    with at(0.0):
        print(f"strength 0: frames equal to the base's: {bool(np.array_equal(new()[0], base))}", flush=True)
    rows = [base]
    for strength in STRENGTHS:
        with at(strength):
            clips, success = new()
        distance = np.abs(clips.astype(float) - base).mean()
        print(f"strength {strength}: new concept {success:.0%}, distance {distance:.2f} of 255", flush=True)
        rows.append(clips)
    with at(1.0):
        kept = old()
    print(f"strength 1.0: old concepts {kept:.0%}, {kept / max(base_old, 1e-9):.0%} of the base's")
    if options.sheet:
        options.sheet.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows[0], rows[-1], options.sheet / "learning.png")


def contact_sheet(base: np.ndarray, learnt: np.ndarray, path: Path, *, count: int = 6) -> None:
    """Draw base above LoRA for each of `count` clips, every other frame."""
    pairs = [row for index in range(count) for row in (base[index], learnt[index])]
    sheet = Image.fromarray(np.concatenate([np.concatenate(list(row[::2]), axis=1) for row in pairs]))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
