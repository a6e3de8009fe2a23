"""Describe a video: the inputs, spelled out literally because Cog reads them statically."""

from typing import Optional

from cog import BaseRunner, Input, Path

from lib.predictors.start import start_caption


class Runner(BaseRunner):
    # Cog passes weights only to a setup that has the parameter.
    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.predictor = start_caption()

    def run(
        self,
        video: Path = Input(description="The clip to describe: mp4, mov, webm, mkv, avi, gif and others."),
        prompt: str = Input(
            description="What to ask about the clip.",
            max_length=10_000,
            default="Please describe this video in detail.",
        ),
        frame_sampling: str = Input(
            description="Which frames the model sees, at most 24. chat: one per second for the first 24 seconds. base: 24 over the first minute. uniform: 24 over the complete clip. auto: chat for clips of 2 to 24 seconds, otherwise uniform.",
            choices=["auto", "chat", "base", "uniform"],
            default="auto",
        ),
        template: str = Input(
            description="How the prompt is presented to the model. auto: chat with chat sampling, otherwise base. chat numbers the frames; base is the unchanged prompt; vqa asks for a short answer.",
            choices=["auto", "chat", "base", "vqa"],
            default="auto",
        ),
        max_new_tokens: int = Input(
            description="Maximum length of the caption in tokens, about three quarters of a word each.",
            ge=1,
            le=2048,
            default=2048,
        ),
        temperature: float = Input(
            description="0 always takes the likeliest token; above 0 tokens are sampled, more randomly with higher values.",
            ge=0,
            le=5,
            default=0,
        ),
        top_p: float = Input(
            description="Sample only from the likeliest tokens with this total probability. Only used if temperature is above 0.",
            ge=0.01,
            le=1,
            default=0.9,
        ),
        seed: Optional[int] = Input(
            description="The same seed and settings give the same caption. Only used if temperature is above 0. Leave empty for a random seed, which the metrics report.",
            default=None,
        ),
    ) -> str:
        return self.predictor(
            self,
            video=video,
            prompt=prompt,
            frame_sampling=frame_sampling,
            template=template,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
