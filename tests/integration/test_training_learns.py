"""A LoRA trained for a minute shows something that the base does not know.

`script/bench learning` measures more: longer training, more clips, and how much of the old concepts is kept.
"""

from pathlib import Path

import numpy as np
import pytest

from lib.lora.attach import Loras
from lib.lora.source import Choice, parse
from lib.serving.registry import PROJECT
from tiny.concept import generate_concept, write_concept_clips
from tiny.evaluate import load_generator
from training.config import TrainingConfig
from training.trainer import train

pytestmark = pytest.mark.slow

SETTINGS = {"guidance_scale": 2.0, "num_inference_steps": 20}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """lora.safetensors of 160 steps over twenty clips."""
    folder = tmp_path_factory.mktemp("learning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COGVIDEOX_CACHE", str(folder / "cache"))
        config = TrainingConfig.from_inputs(
            input_videos=str(write_concept_clips(folder / "clips", 20)),
            max_train_steps=160,
            rank=8,
            learning_rate=1e-3,
            lr_warmup_steps=20,
            train_batch_size=8,
            seed=1,
        )
        return train(config, folder / "run", report=lambda line: None) / "lora.safetensors"


def test_the_new_concept_appears_with_the_lora_and_only_with_it(trained, monkeypatch):
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    generator = load_generator(PROJECT / "weights" / "tiny-i2v")
    loras = Loras(pipeline=generator.pipeline, spec=generator.spec, report=lambda line: None)
    address = parse(str(trained))

    def at(strength: float, count: int) -> tuple[np.ndarray, float]:
        with loras.applied([Choice(address=address, scale=strength)]):
            clips, right = zip(*generate_concept(generator, count, **SETTINGS), strict=True)
        return np.stack(clips).astype(float), float(np.mean(right))

    base, right = zip(*generate_concept(generator, 8, **SETTINGS), strict=True)
    assert sum(right) == 0
    clips, success = at(1.0, 8)
    assert success >= 0.6
    assert np.array_equal(at(0.0, 2)[0], np.stack(base[:2]))
    distances = [np.abs(at(strength, 2)[0] - base[:2]).mean() for strength in (0.2, 0.4, 0.6, 0.8)]
    distances.append(np.abs(clips[:2] - base[:2]).mean())
    assert distances == sorted(distances) and distances[0] > 0
