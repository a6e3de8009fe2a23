"""What a process has imported by its first video, and what becomes of it afterwards."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NEVER_NEEDED = ("transformers", "peft", "torch._dynamo", "sympy", "torch.distributed.tensor")
VIDEO = """
import sys
import predict_t2v
runner = predict_t2v.Runner()
runner.record_metric = lambda name, value: None
runner.setup()
inputs = dict(
    negative_prompt="", num_frames=None, width=None, height=None, fps=None, seed=1, use_dynamic_cfg=False,
    scheduler="dpm", lora_weights="", lora_alpha=None, extra_lora="", extra_lora_alpha=None,
)
def video(**given):
    scales = dict(lora_scale=1.0, extra_lora_scale=1.0, guidance_scale=6.0, num_inference_steps=2)
    text = dict(prompt="a red circle moves right on a black background", output_format="mp4", speed="exact")
    return runner.run(**(inputs | scales | text | given)).read_bytes()
first = video()
"""


def run(code: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COGVIDEOX_MODEL": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=variables | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_video_without_a_lora_imports_neither_peft_nor_transformers_nor_the_compiler():
    printed = run(VIDEO + f"print('imported', [name for name in {NEVER_NEEDED} if name in sys.modules])")
    assert printed.splitlines()[-1] == "imported []"


def test_it_is_the_same_video_when_they_are_imported_before_or_meanwhile():
    hashed = "import hashlib; print('first', hashlib.sha256(first).hexdigest())\n"
    again = "import peft, torch._dynamo; assert video() == first; print('again')"
    lean = run(VIDEO + hashed + again)
    plain = run("import torch._dynamo, transformers, peft, diffusers.pipelines.cogvideo\n" + VIDEO + hashed)
    assert "\nagain" in lean
    assert [line for line in lean.splitlines() if line.startswith("first")] == [
        line for line in plain.splitlines() if line.startswith("first")
    ]


def test_a_promised_name_brings_in_its_library_when_it_is_used():
    code = """
import sys
from lib.pipelines.lean_imports import Promise, import_diffusers
import_diffusers()
from diffusers.loaders import lora_base
from diffusers.pipelines.cogvideo import pipeline_cogvideox
promised = lora_base.BaseTunerLayer
print(type(promised) is Promise, isinstance(3, promised), "peft" in sys.modules)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.lora import Linear
print(issubclass(Linear, promised), isinstance(3, promised), promised.__class__ is Promise)
class Mine(promised): pass
print(issubclass(Mine, BaseTunerLayer))
print(pipeline_cogvideox.T5EncoderModel.__class__ is Promise, "transformers" in sys.modules)
print(pipeline_cogvideox.T5EncoderModel.config_class.__name__)
"""
    assert run(code).splitlines() == [
        "True False False",
        "True False True",
        "True",
        "True True",  # peft imports transformers
        "T5Config",
    ]


def test_diffusers_works_as_ever_after_a_lean_import():
    code = f"""
from lib.pipelines.lean_imports import import_diffusers
diffusers = import_diffusers()
import torch
diffusers.utils.logging.disable_progress_bar()
pipeline = diffusers.CogVideoXPipeline.from_pretrained(r"{ROOT}/weights/tiny-t2v", local_files_only=True)
print(type(pipeline.text_encoder).__module__.partition(".")[0], type(pipeline.tokenizer).__name__)
compiled = torch.compile(pipeline.transformer, backend="eager")
from diffusers.utils.torch_utils import is_compiled_module
print(is_compiled_module(compiled), is_compiled_module(pipeline.transformer))
"""
    assert run(code).splitlines() == ["transformers T5Tokenizer", "True False"]


def test_a_library_that_is_there_is_not_promised():
    code = """
import transformers
from lib.pipelines.lean_imports import Promise, import_diffusers
import_diffusers()
from diffusers.pipelines.cogvideo import pipeline_cogvideox
print(pipeline_cogvideox.T5EncoderModel is transformers.T5EncoderModel)
"""
    assert run(code) == "True\n"
