"""The trainer's Cog entry, whose inputs Cog reads statically.

Written by `python -m training.signature` from training/groups.py; edit that instead.
"""

# fmt: off
from typing import Optional

from cog import BaseModel, Input, Path, Secret

from lib.predictors import input_files
from training.cog_trainer import CogTrainer

input_files.install()  # Cog fetches inputs before train() is called, and trainers have no setup()

TRAINER = CogTrainer()


class TrainingOutput(BaseModel):
    weights: Path


def train(
    input_videos: Optional[Path] = Input(description="Zip or tar of video clips, each with a .txt caption of the same name (or metadata.jsonl, metadata.csv, or prompts.txt and videos.txt).", default=None),
    dataset_name: str = Input(description="In place of input_videos: a Hugging Face dataset, owner/name or owner/name@revision.", max_length=4_000, default=""),
    video_column: str = Input(description="Column of metadata.jsonl or .csv with the clips' paths; empty: the usual names are tried.", max_length=4_000, default=""),
    caption_column: str = Input(description="Column with the captions; empty: the usual names are tried.", max_length=4_000, default=""),
    trigger_word: str = Input(description="Put before every caption that does not contain it.", max_length=10_000, default=""),
    caption_prefix: str = Input(description="Put before every caption, in front of the trigger word.", max_length=10_000, default=""),
    caption_suffix: str = Input(description="Put after every caption.", max_length=10_000, default=""),
    autocaption: bool = Input(description="Let a captioning model describe the clips that have no caption, before anything else is computed.", default=False),
    autocaption_prompt: str = Input(description="Prompt for the captioning model; empty: describe the clip in detail.", max_length=10_000, default=""),
    autocaption_model: str = Input(description="Its name or Hub repository; empty: cogvlm2-caption, or tiny-caption for an embedded base.", max_length=4_000, default=""),
    fps: Optional[int] = Input(description="Clips are resampled to this rate, by default the base's; another rate changes the learned speed.", ge=1, le=60, default=None),
    max_num_frames: Optional[int] = Input(description="Longest sample in frames, by default the base's length; shorter clips give shorter samples.", ge=5, le=1000, default=None),
    height: Optional[int] = Input(description="Height of the samples, by default the base's.", ge=16, le=4096, default=None),
    width: Optional[int] = Input(description="Width of the samples, by default the base's.", ge=16, le=4096, default=None),
    skip_frames_start: int = Input(description="Frames of each file that are left out at its beginning.", ge=0, le=100000, default=0),
    skip_frames_end: int = Input(description="Frames of each file that are left out at its end.", ge=0, le=100000, default=0),
    video_reshape_mode: str = Input(description="center: fill the frame, cut both sides equally. random: cut at random. none: keep all, black bars.", choices=["center", "random", "none"], default="center"),
    random_crops: int = Input(description="With video_reshape_mode random: how many crops of each sample are encoded and drawn from.", ge=1, le=64, default=4),
    random_flip: float = Input(description="Probability that a sample is mirrored; both sides are encoded.", ge=0, le=1, default=0.0),
    long_clips: str = Input(description="A clip longer than a sample: split it into several, or cut it after the first.", choices=["split", "cut"], default="split"),
    on_bad_clip: str = Input(description="Clips that cannot be used: skip them, or stop and list them all.", choices=["skip", "stop"], default="skip"),
    rank: int = Input(description="Rank of the LoRA matrices.", ge=1, le=1024, default=128),
    lora_alpha: Optional[float] = Input(description="The update is scaled by lora_alpha / rank; by default the rank, which every loader assumes.", ge=0.0001, le=8192, default=None),
    target_modules: str = Input(description="Linear layers of the transformer that get LoRA matrices, by the end of their names.", max_length=4_000, default="to_q,to_k,to_v,to_out.0"),
    max_train_steps: Optional[int] = Input(description="Optimizer steps in all, those before a resume included; 1500 where num_train_epochs is empty too.", ge=1, le=1000000, default=None),
    num_train_epochs: Optional[int] = Input(description="In place of max_train_steps: passes over the samples.", ge=1, le=100000, default=None),
    train_batch_size: int = Input(description="Samples per batch on each device.", ge=1, le=1024, default=1),
    gradient_accumulation_steps: int = Input(description="Batches whose gradients make one optimizer step.", ge=1, le=1024, default=1),
    learning_rate: float = Input(description="Peak of the schedule. For prodigy give 1.", ge=0, le=10, default=0.0001),
    scale_lr: bool = Input(description="Multiply the learning rate by devices x accumulation x batch size.", default=False),
    lr_scheduler: str = Input(description="Shape of the learning rate over the steps.", choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"], default="constant"),
    lr_warmup_steps: Optional[int] = Input(description="Steps in which the rate rises from 0; by default a tenth of all, at most 500. Not for constant.", ge=0, le=1000000, default=None),
    lr_num_cycles: int = Input(description="Restarts of cosine_with_restarts.", ge=1, le=1000, default=1),
    lr_power: float = Input(description="Power of polynomial.", ge=0, le=100, default=1.0),
    optimizer: str = Input(description="The 8-bit ones need an NVIDIA GPU and bitsandbytes, prodigy needs prodigyopt.", choices=["adam", "adamw", "adam_8bit", "adamw_8bit", "prodigy"], default="adam"),
    adam_beta1: float = Input(description="Decay of the gradient's running mean; also prodigy's.", ge=0, le=0.9999, default=0.9),
    adam_beta2: float = Input(description="Decay of the squared gradient's running mean; also prodigy's.", ge=0, le=0.999999, default=0.95),
    adam_weight_decay: float = Input(description="Decoupled in adamw, part of the gradient in adam; also prodigy's.", ge=0, le=10, default=0.0001),
    adam_epsilon: float = Input(description="Added to the denominator; also prodigy's.", ge=1e-16, le=1, default=1e-08),
    prodigy_beta3: Optional[float] = Input(description="Decay of prodigy's step size estimate; by default the square root of beta2.", ge=0, le=0.999999, default=None),
    prodigy_decouple: bool = Input(description="Weight decay as in adamw.", default=True),
    prodigy_use_bias_correction: bool = Input(description="Adam's bias correction in prodigy.", default=True),
    prodigy_safeguard_warmup: bool = Input(description="Keep the warm-up's small rates out of prodigy's estimate.", default=True),
    max_grad_norm: float = Input(description="Gradients are scaled down to this norm; 0 leaves them as they are.", ge=0, le=1000, default=1.0),
    noised_image_dropout: float = Input(description="Share of samples whose image condition is zero; image to video only.", ge=0, le=1, default=0.05),
    caption_dropout: float = Input(description="Share of samples trained with an empty caption, for classifier-free guidance.", ge=0, le=1, default=0.1),
    prior_preservation: float = Input(description="Share of samples that preserve what the base knows: with one of prior_prompts, the LoRA learns to predict what the base predicts. Needs no additional clips.", ge=0, le=0.9, default=0.0),
    prior_prompts: str = Input(description="Prompts for prior_preservation, separated by validation_prompt_separator; by default the empty prompt.", max_length=100_000, default=""),
    gradient_checkpointing: Optional[bool] = Input(description="Recompute activations in the backward pass: far less memory, a third more work. By default only on a GPU.", default=None),
    mixed_precision: str = Input(description="Type that the base computes in; the LoRA matrices are always float32. auto: bf16 on a GPU that supports it, fp16 on an older one, no on a CPU.", choices=["auto", "no", "fp16", "bf16"], default="auto"),
    base_precision: str = Input(description="fp8: keep the frozen base's linear layers in 8 bits, half the memory, and compute as before.", choices=["auto", "fp8"], default="auto"),
    allow_tf32: bool = Input(description="TF32 for float32 products on an NVIDIA GPU.", default=False),
    enable_slicing: bool = Input(description="Decode validation clips one after the other.", default=False),
    enable_tiling: bool = Input(description="Encode and decode in tiles: less memory, slightly different latents.", default=False),
    seed: Optional[int] = Input(description="The same seed, settings and clips give the same losses. Empty: a random seed, recorded in the model card.", ge=0, le=9223372036854775807, default=None),
    checkpointing_steps: int = Input(description="Steps between checkpoints; a killed run loses at most the steps since its last checkpoint.", ge=1, le=1000000, default=500),
    checkpoints_total_limit: int = Input(description="How many of the newest checkpoints are kept.", ge=1, le=1000, default=3),
    resume_from: str = Input(description="URL of an earlier output (tar) to resume from; exactly, optimizer included, if it was made with save_training_state.", max_length=4_000, default=""),
    save_training_state: bool = Input(description="Put the last checkpoint, optimizer included, into the output, so that resume_from continues exactly.", default=False),
    validation_prompt: str = Input(description="Prompt of clips made during training; several are separated by validation_prompt_separator.", max_length=100_000, default=""),
    validation_images: Optional[list[Path]] = Input(description="First frame of each prompt's clips; image to video only.", default=None),
    validation_prompt_separator: str = Input(description="Text that separates several validation prompts.", max_length=4_000, default=":::"),
    num_validation_videos: int = Input(description="Clips of each prompt, each with a seed of its own.", ge=1, le=16, default=1),
    validation_steps: int = Input(description="Steps between validation clips, which are also made at the end.", ge=1, le=1000000, default=500),
    validation_inference_steps: int = Input(description="Denoising steps of validation clips.", ge=1, le=500, default=50),
    guidance_scale: float = Input(description="Guidance of validation clips.", ge=1, le=20, default=6.0),
    use_dynamic_cfg: bool = Input(description="Dynamic guidance in validation clips.", default=False),
    report_to: str = Input(description="Trackers that receive loss, learning rate and validation clips.", choices=["none", "tensorboard", "wandb", "all"], default="none"),
    tracker_name: str = Input(description="Project in the tracker.", max_length=4_000, default="cogvideox-lora"),
    wandb_api_key: Optional[Secret] = Input(description="Key for report_to wandb.", default=None),
    hub_model_id: str = Input(description="Hugging Face repository (owner/name) that receives the result; created, as private, if it does not exist.", max_length=4_000, default=""),
    hub_token: Optional[Secret] = Input(description="Hugging Face token with write access, for hub_model_id.", default=None),
    push_checkpoints: bool = Input(description="Also upload each checkpoint as it is made, under checkpoints/.", default=False),
    nccl_timeout: int = Input(description="Seconds that one process of several waits for the others.", ge=1, le=86400, default=600),
) -> TrainingOutput:
    return TrainingOutput(weights=TRAINER.train(**locals()))  # pyright: ignore[reportCallIssue]
