"""The comparison of all serving figures: a plain diffusers script in the manner of the seed's predictor.

Everything resident, no tiling, one `from_pretrained`, one pipeline call and one `export_to_video` per
request; the same classes, threads, dtype, size and steps as the service. Not to be changed by later work.

    python bench/seed_style.py FOLDER OUTPUT < requests.jsonl

Reads one JSON request a line ({"prompt", "seed", "num_inference_steps", "guidance_scale"}), prints one JSON
line when it is ready and one per finished video.
"""

import json
import sys
import time

started = time.perf_counter()

import torch  # noqa: E402
from diffusers import CogVideoXPipeline  # noqa: E402
from diffusers.utils import export_to_video  # noqa: E402


def main() -> None:
    folder, output = sys.argv[1:]
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    transformer = pipeline.transformer.config
    print(json.dumps({"ready_seconds": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        frames = pipeline(
            prompt=request["prompt"],
            num_inference_steps=request["num_inference_steps"],
            guidance_scale=request["guidance_scale"],
            num_frames=transformer.sample_frames,
            max_sequence_length=transformer.max_text_seq_length,
            generator=torch.Generator().manual_seed(request["seed"]),
        ).frames[0]
        export_to_video(frames, output, fps=8)
        print(json.dumps({"request_seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
