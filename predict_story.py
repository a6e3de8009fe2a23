"""Idea to film: the inputs, spelled out literally because Cog reads them statically."""

from typing import Optional

from cog import BaseRunner, Input, Path

from lib.predictors.start import start_story


class Runner(BaseRunner):
    # Cog passes weights only to a setup that has the parameter.
    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.predictor = start_story()

    def run(
        self,
        idea: str = Input(
            description="What the film shows, in any words: a lighthouse in a storm, then morning. Not needed with a storyboard.",
            max_length=10_000,
            default="",
        ),
        scenes: int = Input(
            description="Into how many scenes the idea is divided. Each becomes one clip.",
            ge=1,
            le=8,
            default=1,
        ),
        storyboard: Optional[Path] = Input(
            description="A storyboard.json that an earlier run returned, perhaps edited. What it says is not asked of the language model again.",
            default=None,
        ),
        image: Optional[Path] = Input(
            description="The first frame of the first scene, in any common image format. Empty: it is painted like the others.",
            default=None,
        ),
        stop_after: str = Input(
            description="How far to go: only write the storyboard, also paint the first frame of each scene, or make clips and film.",
            choices=["storyboard", "images", "film"],
            default="film",
        ),
        only_scene: Optional[int] = Input(
            description="Make only this scene of the storyboard, counted from 1, and no film.",
            ge=1,
            le=8,
            default=None,
        ),
        transition: str = Input(
            description="How one scene goes over into the next.", choices=["cut", "crossfade"], default="cut"
        ),
        transition_seconds: float = Input(description="How long a crossfade takes.", ge=0, le=5, default=0.5),
        seed: Optional[int] = Input(
            description="Same seed and inputs, same film. Scene N uses seed + N - 1. Empty: the storyboard's, else a random one.",
            default=None,
        ),
        negative_prompt: str = Input(
            description="What the videos should not show. Has an effect only when guidance_scale is above 1.",
            max_length=10_000,
            default="",
        ),
        num_inference_steps: int = Input(
            description="Denoising steps of each clip. More is slower and finer; 50 is what the model's authors use.",
            ge=1,
            le=500,
            default=50,
        ),
        guidance_scale: float = Input(
            description="How strictly the clips follow their prompts. 1 takes half the time; high values oversaturate.",
            ge=1,
            le=20,
            default=6,
        ),
        num_frames: Optional[int] = Input(
            description="Length of each clip in frames. Leave empty for the model's own length. CogVideoX takes 8N+1 frames (9, 17, ... 49), CogVideoX1.5 takes 16N+1 (17, 33, ... 161).",
            default=None,
        ),
        width: Optional[int] = Input(
            description="Width in pixels. Leave empty for the model's own; where the model supports several sizes, the one closest to the image's proportions.",
            default=None,
        ),
        height: Optional[int] = Input(
            description="Height in pixels. Leave empty for the model's own, as for width.", default=None
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
    ) -> list[Path]:
        return self.predictor(
            self,
            idea=idea,
            scenes=scenes,
            storyboard=storyboard,
            image=image,
            stop_after=stop_after,
            only_scene=only_scene,
            transition=transition,
            transition_seconds=transition_seconds,
            seed=seed,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_frames=num_frames,
            width=width,
            height=height,
            use_dynamic_cfg=use_dynamic_cfg,
            scheduler=scheduler,
            speed=speed,
        )
