"""Video to text: the inputs of Replicate's form, spelled out literally because Cog reads them statically."""

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
            description="What to ask about the clip.", default="Please describe this video in detail."
        ),
        frame_sampling: str = Input(
            description="Which frames the model sees, at most 24. chat: one a second, the first 24 seconds. base: 24 over the first minute. uniform: 24 over the whole clip. auto: chat for clips of 2 to 24 seconds, uniform for others.",
            choices=["auto", "chat", "base", "uniform"],
            default="auto",
        ),
        template: str = Input(
            description="How the question is put to the model. auto: chat with chat, base with base and uniform. chat numbers the frames; base gives the prompt as it is; vqa asks for a short answer.",
            choices=["auto", "chat", "base", "vqa"],
            default="auto",
        ),
        max_new_tokens: int = Input(
            description="Longest caption in tokens, about three quarters of a word each.",
            ge=1,
            le=2048,
            default=2048,
        ),
        temperature: float = Input(
            description="0 always takes the likeliest word; above it words are drawn, the more freely the higher.",
            ge=0,
            le=5,
            default=0,
        ),
        top_p: float = Input(
            description="Draw only from the likeliest words that together have this probability. Has an effect only when temperature is above 0.",
            ge=0.01,
            le=1,
            default=0.9,
        ),
        seed: Optional[int] = Input(
            description="Same seed and settings, same caption. Matters only when temperature is above 0. Leave empty for a random seed, which the metrics report.",
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
