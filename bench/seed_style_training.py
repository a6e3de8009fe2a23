"""The comparison of the training figures: a plain LoRA loop in the manner of CogVideo's own trainer.

Every clip decoded into a list of float tensors, every latent in memory, VAE and text encoder resident and the
text encoder run at every step, gradient checkpointing as its launch script sets it. The same classes, base,
clips, batch, rank, optimizer and number of threads as the service's trainer. Not to be changed by later work.

    python bench/seed_style_training.py FOLDER CLIPS FRAMES STEPS BATCH RANK CHECKPOINTING

Prints one JSON line: steps a second after the first few, and the process's peak memory.
"""

import json
import resource
import sys
import time
from pathlib import Path

import decord
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.optimization import get_scheduler
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, T5EncoderModel

WARM_UP = 5


class Clips(Dataset):
    """Everything in memory: pixels, latents and image latents of all clips."""

    def __init__(self, folder: Path, vae: AutoencoderKLCogVideoX, frames: int) -> None:
        paths = sorted(folder.glob("*.mp4"))
        self.prompts = [path.with_suffix(".txt").read_text().strip() for path in paths]
        self.videos = [self.read(path, frames) for path in paths]
        self.encoded = [self.encode(vae, video) for video in self.videos]

    def read(self, path: Path, frames: int) -> torch.Tensor:
        """[F, C, H, W] in -1..1."""
        reader = decord.VideoReader(str(path), num_threads=1)
        pixels = torch.from_numpy(reader.get_batch(list(range(min(frames, len(reader))))).asnumpy())
        return torch.stack([frame.float() / 127.5 - 1 for frame in pixels]).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def encode(self, vae: AutoencoderKLCogVideoX, video: torch.Tensor) -> tuple:
        video = video[None].permute(0, 2, 1, 3, 4)
        image = video[:, :, :1]
        sigma = torch.exp(torch.normal(mean=-3.0, std=0.5, size=(1,)))
        noisy = image + torch.randn_like(image) * sigma[:, None, None, None, None]
        return vae.encode(video).latent_dist, vae.encode(noisy).latent_dist

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        return {"prompt": self.prompts[index], "video": self.encoded[index]}


def main() -> None:
    folder, clips = Path(sys.argv[1]), Path(sys.argv[2])
    frames, steps, batch, rank, checkpointing = (int(value) for value in sys.argv[3:])
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", dtype=torch.float32)
    scheduler = CogVideoXDPMScheduler.from_pretrained(folder / "scheduler")
    for model in (text_encoder, transformer, vae):
        model.requires_grad_(False)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=targets)
    )
    cast_training_params([transformer], dtype=torch.float32)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    config, factor = transformer.config, vae.config.scaling_factor

    def collate(examples: list[dict]) -> dict:
        videos = [example["video"][0].sample() * factor for example in examples]
        images = [example["video"][1].sample() * factor for example in examples]
        padded = []
        for video, image in zip(videos, images, strict=True):
            if torch.rand(1) < 0.05:
                image = torch.zeros_like(image)
            after = video.new_zeros((1, video.shape[1], video.shape[2] - 1, *video.shape[3:]))
            padded.append(torch.cat([image, after], dim=2))
        return {
            "prompts": [example["prompt"] for example in examples],
            "videos": torch.cat(videos).permute(0, 2, 1, 3, 4).contiguous().float(),
            "images": torch.cat(padded).permute(0, 2, 1, 3, 4).contiguous().float(),
        }

    data = Clips(clips, vae, frames)
    loader = DataLoader(data, batch_size=batch, shuffle=True, collate_fn=collate, num_workers=0)
    schedule = get_scheduler("constant", optimizer=optimizer)
    transformer, optimizer, loader, schedule = accelerator.prepare(transformer, optimizer, loader, schedule)
    transformer.train()
    done, start = 0, 0.0
    while done < steps + WARM_UP:
        for examples in loader:
            if done == WARM_UP:
                start = time.perf_counter()
            with accelerator.accumulate(transformer):
                video, image = examples["videos"], examples["images"]
                ids = tokenizer(
                    examples["prompts"],
                    padding="max_length",
                    max_length=config.max_text_seq_length,
                    truncation=True,
                    add_special_tokens=True,
                    return_tensors="pt",
                ).input_ids
                text = text_encoder(ids)[0].detach()
                noise = torch.randn_like(video)
                timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(video),)).long()
                grid = (video.shape[3] // config.patch_size, video.shape[4] // config.patch_size)
                rotary = get_3d_rotary_pos_embed(
                    embed_dim=config.attention_head_dim,
                    crops_coords=get_resize_crop_region_for_grid(grid, grid[1], grid[0]),
                    grid_size=grid,
                    temporal_size=video.shape[1],
                )
                noisy = scheduler.add_noise(video, noise, timesteps)
                output = transformer(
                    hidden_states=torch.cat([noisy, image], dim=2),
                    encoder_hidden_states=text,
                    timestep=timesteps,
                    image_rotary_emb=rotary,
                    return_dict=False,
                )[0]
                predicted = scheduler.get_velocity(output, noisy, timesteps)
                weights = 1 / (1 - scheduler.alphas_cumprod[timesteps])
                while len(weights.shape) < len(predicted.shape):
                    weights = weights.unsqueeze(-1)
                error = (weights * (predicted - video) ** 2).reshape(len(video), -1)
                loss = error.mean(dim=1).mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            loss.detach().item()
            done += 1
            if done >= steps + WARM_UP:
                break
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"steps_per_second": steps / seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
