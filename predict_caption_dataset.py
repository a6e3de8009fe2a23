"""Caption the clips of a data set: the inputs, spelled out literally because Cog reads them statically."""

from typing import Optional

from cog import BaseRunner, Input, Path

from lib.predictors.start import start_caption_dataset


class Runner(BaseRunner):
    # Cog passes weights only to a setup that has the parameter.
    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.predictor = start_caption_dataset()

    def run(
        self,
        input_videos: Path = Input(
            description="Zip or tar of video clips, in folders or not. Some may have captions: in a .txt of the same name, metadata.jsonl, metadata.csv, or prompts.txt and videos.txt."
        ),
        prompt: str = Input(
            description="What to ask about each clip.",
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
            description="The same seed, settings and clips give the same captions. Only used if temperature is above 0. Leave empty for a random seed.",
            default=None,
        ),
        trigger_word: str = Input(
            description="Word to put before every new caption that does not contain it.",
            max_length=10_000,
            default="",
        ),
        caption_prefix: str = Input(
            description="Text to put before every new caption and its trigger word.",
            max_length=10_000,
            default="",
        ),
        caption_suffix: str = Input(
            description="Text to put after every new caption.",
            max_length=10_000,
            default="",
        ),
        existing_captions: str = Input(
            description="Whether to keep existing captions, or to replace them.",
            choices=["keep", "replace"],
            default="keep",
        ),
        include_videos: bool = Input(
            description="Whether the zip contains the clips too, so that it can be used for training.",
            default=True,
        ),
        batch_size: int = Input(
            description="How many clips the model describes in one batch.",
            ge=1,
            le=64,
            default=8,
        ),
        on_bad_clip: str = Input(
            description="A clip that cannot be used: caption the rest and list it in errors.jsonl, or stop.",
            choices=["skip", "stop"],
            default="skip",
        ),
    ) -> Path:
        return self.predictor(
            self,
            input_videos=input_videos,
            prompt=prompt,
            frame_sampling=frame_sampling,
            template=template,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            trigger_word=trigger_word,
            caption_prefix=caption_prefix,
            caption_suffix=caption_suffix,
            existing_captions=existing_captions,
            include_videos=include_videos,
            batch_size=batch_size,
            on_bad_clip=on_bad_clip,
        )
