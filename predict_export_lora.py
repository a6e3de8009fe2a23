"""Convert SAT LoRAs to diffusers and back: the inputs, written literally because Cog reads them."""

from typing import Optional

from cog import BaseRunner, Input, Path

from lib.predictors.convert import ExportLoraPredictor


class Runner(BaseRunner):
    # Cog passes weights only to a setup that has the parameter.
    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.predictor = ExportLoraPredictor.start()

    def run(
        self,
        lora: Optional[Path] = Input(
            description="The LoRA, up to 2 GiB: the .pt file of SAT's training, with or without the model in it, or a zip or tar of its folder. For direction=to_sat a .safetensors file.",
            default=None,
        ),
        lora_url: str = Input(
            description="The same by its https:// address, of any size.",
            max_length=4_000,
            default="",
        ),
        alpha: Optional[float] = Input(
            description="The alpha that the LoRA was trained with, which SAT does not store. Empty: SAT's default of 1. CogVideo's own recipes use 64 at rank 128. With to_sat: the alpha that it will be used with.",
            default=None,
        ),
        direction: str = Input(
            description="to_diffusers: from a SAT checkpoint to lora.safetensors, with alpha / rank multiplied in. to_sat: back to a SAT checkpoint.",
            choices=["to_diffusers", "to_sat"],
            default="to_diffusers",
        ),
        dtype: str = Input(
            description="Type of the weights. auto: float32, which loses nothing; with to_sat the type they were stored in.",
            choices=["auto", "float16", "bfloat16", "float32"],
            default="auto",
        ),
    ) -> Path:
        return self.predictor(
            self, lora=lora, lora_url=lora_url, alpha=alpha, direction=direction, dtype=dtype
        )
