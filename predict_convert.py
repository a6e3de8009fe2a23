"""Convert SAT checkpoints to diffusers and back: the inputs, written literally because Cog reads them."""

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
            max_length=4_000,
            default="",
        ),
        vae: Optional[Path] = Input(
            description="The VAE, 3d-vae.pt, up to 2 GiB.",
            default=None,
        ),
        vae_url: str = Input(
            description="The same by its https:// address.",
            max_length=4_000,
            default="",
        ),
        direction: str = Input(
            description="to_diffusers: from SAT's layout to a folder that from_pretrained loads. to_sat: back to SAT's layout.",
            choices=["to_diffusers", "to_sat"],
            default="to_diffusers",
        ),
        family: str = Input(
            description="The model that a VAE belongs to, needed for a VAE alone because its scaling cannot be read from the weights. auto: detected from the transformer.",
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
            description="Type of the transformer's weights. auto: float16 for the 2B family, bfloat16 for 5B; unchanged with to_sat, where it applies to the VAE too.",
            choices=["auto", "float16", "bfloat16", "float32"],
            default="auto",
        ),
        vae_dtype: str = Input(
            description="Type of the VAE's weights. auto: float32.",
            choices=["auto", "float16", "bfloat16", "float32"],
            default="auto",
        ),
        text_encoder: bool = Input(
            description="Include the released text encoder and tokenizer (9.5 GB). Without them the result's README says how to load it.",
            default=False,
        ),
        overrides: str = Input(
            description="Configuration values that cannot be read from the weights, where they differ from the family's: name=value, separated by commas. Allowed: sample_height, sample_width (in latents, 8 pixels each), sample_frames, max_text_seq_length, spatial_interpolation_scale, temporal_interpolation_scale, norm_num_groups, scaling_factor, invert_scale_latents, snr_shift_scale.",
            max_length=4_000,
            default="",
        ),
        hub_repository: str = Input(
            description="Hugging Face repository owner/name to upload the result to. A new repository is private.",
            max_length=4_000,
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
