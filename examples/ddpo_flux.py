"""
FLUX.1-dev, a flow-matching model: the SDE of Flow-GRPO adds noise, but only in a window of steps, as in MixGRPO.

```bash
python examples/ddpo_flux.py                  # one GPU with 80 GB
python examples/ddpo_flux.py --sde_type cps   # Flow-CPS: images stay cleaner

# On a CPU, without a download: the emoji pipeline. It uses DDIM: the window has an effect, `noise_level` and
# `sde_type` do not.
python examples/ddpo_flux.py --embedded --guidance_scale 4 --num_train_epochs 5
```

FLUX.1-dev's guidance is an input of the network, not a second pass; 3.5 is its usual value. The latents have
16 x 64 x 64 numbers at 512 x 512, and the clip range depends on that: see `cliprange` in DDPOConfig.
"""

from dataclasses import dataclass, field

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.emoji import emoji_captions
from ddpo_trl.policy.lora import attention_projections
from ddpo_trl.prompts import animal_activities
from ddpo_trl.rewards import EmojiAlignment, ImageReward
from ddpo_trl.rewards.function import RewardFunction


@dataclass
class ScriptArguments:
    model: str = field(
        default="black-forest-labs/FLUX.1-dev", metadata={"help": "Pipeline to train: Hub id or folder."}
    )
    size: int = field(default=512, metadata={"help": "Width and height of the images."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapter."})
    embedded: bool = field(default=False, metadata={"help": "Train the emoji pipeline, without a download."})


def main() -> None:
    parser = TrlParser([ScriptArguments, DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/flux",
        num_train_epochs=100,
        num_inference_steps=10,
        guidance_scale=3.5,
        noise_level=0.7,
        sde_window_size=2,
        sde_window_strategy="progressive",
        per_device_sample_batch_size=4,
        num_sample_batches=24,
        num_images_per_prompt=12,
        advantage_normalization="group",
        per_device_train_batch_size=4,
        num_mini_batches=2,
        cliprange=2.5e-5,
        learning_rate=1e-4,
        gradient_checkpointing=True,
        offload_text_encoders=True,
        offload_rollout=True,
    )
    arguments, config = parser.parse_args_and_config()
    reward: RewardFunction
    if arguments.embedded:
        pipeline, prompts = load_emoji_pipeline(), emoji_captions()
        denoiser, reward = pipeline.unet, EmojiAlignment()
    else:
        pipeline = FluxPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)
        prompts = [prompt for prompt, _ in animal_activities()]
        denoiser, reward = pipeline.transformer, ImageReward()
        config.pipeline_kwargs = {"height": arguments.size, "width": arguments.size} | (config.pipeline_kwargs or {})
    adapter = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        init_lora_weights="gaussian",
        target_modules=attention_projections(denoiser),
    )
    trainer = DDPOTrainer(config, reward, prompts, pipeline, peft_config=adapter)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
