"""
SDXL with PickScore, a model of human preference, at 1024 x 1024 on one GPU with 24 GB.

```bash
python examples/ddpo_sdxl.py
python examples/ddpo_sdxl.py --prompts prompts.txt --total_episodes 20000

# On a CPU, without a download: the emoji pipeline, its captions and its own alignment reward.
python examples/ddpo_sdxl.py --embedded --num_inference_steps 10 --num_train_epochs 5
```

A latent has D = 4 x 128 x 128 numbers, four times those of Stable Diffusion 1.5. The ratio is the D-th root of the
true one, so the clip range that allows the same change of an image is a quarter of 1e-4.
"""

from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionXLPipeline
from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.emoji import emoji_captions
from ddpo_trl.prompts import load_prompts
from ddpo_trl.rewards import EmojiAlignment, PickScore


@dataclass
class ScriptArguments:
    model: str = field(
        default="stabilityai/stable-diffusion-xl-base-1.0", metadata={"help": "Pipeline to train: Hub id or folder."}
    )
    prompts: str = field(default="nateraw/parti-prompts", metadata={"help": "File of prompts or Hub dataset."})
    column: str = field(default="Prompt", metadata={"help": "Column of the dataset with the prompts."})
    embedded: bool = field(default=False, metadata={"help": "Train the emoji pipeline, without a download."})


def main() -> None:
    parser = TrlParser([ScriptArguments, DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/sdxl-pickscore",
        num_train_epochs=200,
        num_inference_steps=30,
        train_timestep_range=[0.0, 0.8],
        per_device_sample_batch_size=2,
        num_sample_batches=32,
        num_images_per_prompt=8,
        advantage_normalization="group",
        per_device_train_batch_size=2,
        num_mini_batches=2,
        cliprange=2.5e-5,
        learning_rate=1e-4,
        gradient_checkpointing=True,
        offload_text_encoders=True,
        offload_rollout=True,
        vae_slicing=True,
    )
    arguments, config = parser.parse_args_and_config()
    if arguments.embedded:
        trainer = DDPOTrainer(config, EmojiAlignment(), emoji_captions(), load_emoji_pipeline())
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)
        prompts = load_prompts(arguments.prompts, column=arguments.column)
        trainer = DDPOTrainer(config, PickScore(dtype=torch.bfloat16), prompts, pipeline)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
