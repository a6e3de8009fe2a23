"""Image to video: the inputs of Replicate's form, spelled out literally because Cog reads them statically."""

from typing import Optional, Union

from cog import BaseRunner, Input, Path

from lib.predictors.start import start_video


class Runner(BaseRunner):
    def setup(self, weights: Optional[Union[Path, str]] = None) -> None:
        self.predictor = start_video("i2v", weights)

    def run(
        self,
        prompt: str = Input(
            description="What happens in the video. These models like a detailed paragraph: subject, movement, setting, light, camera.",
            max_length=10_000,
            default="The subject comes to life and moves gently and naturally, light shifting softly over the scene, while the camera stays steady and the background keeps its detail.",
        ),
        image: Path = Input(description="The first frame of the video, in any common image format and size."),
        image_fit: str = Input(
            description="How the image is fitted to the video's size. crop fills the frame and cuts off the rest, pad keeps the whole image with black bars, stretch ignores proportions.",
            choices=["crop", "pad", "stretch"],
            default="crop",
        ),
        negative_prompt: str = Input(
            description="What the video should not show. Has an effect only when guidance_scale is above 1.",
            max_length=10_000,
            default="",
        ),
        num_inference_steps: int = Input(
            description="Denoising steps. More is slower and finer; 50 is what the model's authors use.",
            ge=1,
            le=500,
            default=50,
        ),
        guidance_scale: float = Input(
            description="How strictly the video follows the prompt. 1 ignores the negative prompt and takes half the time; high values oversaturate.",
            ge=1,
            le=20,
            default=6,
        ),
        num_frames: Optional[int] = Input(
            description="Length in frames. Leave empty for the model's own length. CogVideoX takes 8N+1 frames (9, 17, ... 49), CogVideoX1.5 takes 16N+1 (17, 33, ... 161).",
            default=None,
        ),
        width: Optional[int] = Input(
            description="Width in pixels. Leave empty for the model's own; where the model supports several sizes, the one closest to the image's proportions.",
            default=None,
        ),
        height: Optional[int] = Input(
            description="Height in pixels. Leave empty for the model's own, as for width.", default=None
        ),
        fps: Optional[int] = Input(
            description="Playback rate of the file, in frames per second. Leave empty for the model's own; nothing is resampled, so a higher rate plays faster.",
            ge=1,
            le=60,
            default=None,
        ),
        seed: Optional[int] = Input(
            description="Same seed and settings, same video. Leave empty for a random seed, which the metrics report.",
            default=None,
        ),
        use_dynamic_cfg: bool = Input(
            description="Vary the guidance over the steps, as the authors advise for the 5B models together with scheduler dpm.",
            default=False,
        ),
        scheduler: str = Input(
            description="Sampling method. default is the checkpoint's own; the authors advise ddim for 2B and dpm for 5B.",
            choices=["default", "ddim", "dpm"],
            default="default",
        ),
        speed: str = Input(
            description="How much to compute. exact computes every step; balanced and fast forecast some from the steps before, in about half and a third of the time, with a small loss of quality.",
            choices=["exact", "balanced", "fast"],
            default="exact",
        ),
        lora_weights: str = Input(
            description="A LoRA to apply: the https address of a .safetensors file or of a training's tar, a Hugging Face owner/name or owner/name/file.safetensors, or a data URI. Leave empty for none.",
            max_length=104_857_600,
            default="",
        ),
        lora_scale: float = Input(
            description="Strength of the LoRA. 1 is as trained, 0 is without it, negative values invert it; beyond 2 most LoRAs spoil the video.",
            ge=-10,
            le=10,
            default=1,
        ),
        lora_alpha: Optional[float] = Input(
            description="Alpha the LoRA was trained with, for files that do not store it; leave empty otherwise. Without it alpha is assumed to equal the rank.",
            default=None,
        ),
        extra_lora: str = Input(
            description="A second LoRA, applied together with the first. Takes the same forms as lora_weights.",
            max_length=104_857_600,
            default="",
        ),
        extra_lora_scale: float = Input(
            description="Strength of the second LoRA.",
            ge=-10,
            le=10,
            default=1,
        ),
        extra_lora_alpha: Optional[float] = Input(
            description="Alpha of the second LoRA, like lora_alpha.",
            default=None,
        ),
        output_format: str = Input(
            description="File format of the result. mp4 plays everywhere; webm is VP9; gif has no more than 256 colours.",
            choices=["mp4", "webm", "gif"],
            default="mp4",
        ),
    ) -> Path:
        return self.predictor(
            self,
            prompt=prompt,
            image=image,
            image_fit=image_fit,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_frames=num_frames,
            width=width,
            height=height,
            fps=fps,
            seed=seed,
            use_dynamic_cfg=use_dynamic_cfg,
            scheduler=scheduler,
            speed=speed,
            lora_weights=lora_weights,
            lora_scale=lora_scale,
            lora_alpha=lora_alpha,
            extra_lora=extra_lora,
            extra_lora_scale=extra_lora_scale,
            extra_lora_alpha=extra_lora_alpha,
            output_format=output_format,
        )
