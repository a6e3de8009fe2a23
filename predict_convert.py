"""SAT checkpoints to diffusers and back: the inputs of Replicate's form, spelled out literally because Cog reads them statically."""

from typing import Optional

from cog import BaseRunner, Input, Path, Secret

from lib.predictors.convert import ConvertPredictor


class Runner(BaseRunner):
    # Cog passes weights only to a setup that has the parameter.
    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.predictor = ConvertPredictor.start()

    def run(
        self,
        transformer: Optional[Path] = Input(
            description="The transformer, up to 2 GiB: mp_rank_00_model_states.pt, a fine-tuned file with everything in it, or a zip or tar of the folder that it came in. For direction=to_sat a safetensors file or an archive of a diffusers folder.",
            default=None,
        ),
        transformer_url: str = Input(
            description="The same by its https:// address, of any size.",
            default="",
        ),
        vae: Optional[Path] = Input(
            description="The VAE, 3d-vae.pt, up to 2 GiB.",
            default=None,
        ),
        vae_url: str = Input(
            description="The same by its https:// address.",
            default="",
        ),
        direction: str = Input(
            description="to_diffusers: SAT's layout to a folder that from_pretrained loads. to_sat: the way back.",
            choices=["to_diffusers", "to_sat"],
            default="to_diffusers",
        ),
        family: str = Input(
            description="Needed for a VAE alone: the model that it belongs to, because its scaling is in no tensor. A transformer says it itself.",
            choices=[
                "auto",
                "cogvideox-2b",
                "cogvideox-5b",
                "cogvideox-5b-i2v",
                "cogvideox1.5-5b",
                "cogvideox1.5-5b-i2v",
            ],
            default="auto",
        ),
        dtype: str = Input(
            description="Type of the transformer's weights. auto: float16 for the 2B family, bfloat16 for 5B; to_sat keeps what there is. With to_sat it holds for the VAE too.",
            choices=["auto", "float16", "bfloat16", "float32"],
            default="auto",
        ),
        vae_dtype: str = Input(
            description="Type of the VAE's weights. auto: float32.",
            choices=["auto", "float16", "bfloat16", "float32"],
            default="auto",
        ),
        text_encoder: bool = Input(
            description="Put the released text encoder and tokenizer (9.5 GB) into the result. Without them it is smaller, and its README says how it is loaded.",
            default=False,
        ),
        overrides: str = Input(
            description="What no tensor says, where it is not the family's: name=value, separated by commas. sample_height, sample_width (in latents, 8 pixels each), sample_frames, max_text_seq_length, spatial_interpolation_scale, temporal_interpolation_scale, norm_num_groups, scaling_factor, invert_scale_latents, snr_shift_scale.",
            default="",
        ),
        hub_repository: str = Input(
            description="Hugging Face repository owner/name that the result is uploaded to as well. Made private if it is not there.",
            default="",
        ),
        hub_token: Optional[Secret] = Input(
            description="Hugging Face token with write access, for hub_repository.",
            default=None,
        ),
    ) -> Path:
        return self.predictor(
            self,
            transformer=transformer,
            transformer_url=transformer_url,
            vae=vae,
            vae_url=vae_url,
            direction=direction,
            family=family,
            dtype=dtype,
            vae_dtype=vae_dtype,
            text_encoder=text_encoder,
            overrides=overrides,
            hub_repository=hub_repository,
            hub_token=hub_token,
        )
