"""
Stable Diffusion 1.5 with LAION's aesthetic predictor, the former example of TRL's DDPOTrainer.

```bash
python examples/ddpo_sd15_aesthetic.py
accelerate launch examples/ddpo_sd15_aesthetic.py --report_to wandb --push_to_hub

# On a CPU, without a download: the emoji pipeline, and colorfulness instead of the predictor.
python examples/ddpo_sd15_aesthetic.py --embedded --num_inference_steps 10 --num_train_epochs 5
```

The settings are TRL's: 24 images per round, an optimizer step for every 3 of them, advantages by prompt. Only the
sample batch size is 3 instead of 6, so that replay uses the same kernels as sampling.
"""

from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionPipeline
from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.prompts import common_animals
from ddpo_trl.rewards import LaionAesthetic, colorfulness


@dataclass
class ScriptArguments:
    model: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Pipeline to train: Hub id or folder."},
    )
    embedded: bool = field(default=False, metadata={"help": "Train the emoji pipeline, without a download."})


def main() -> None:
    parser = TrlParser([ScriptArguments, DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/sd15-aesthetic",
        num_train_epochs=200,
        num_inference_steps=50,
        per_device_sample_batch_size=3,
        num_sample_batches=8,
        per_device_train_batch_size=3,
        num_mini_batches=8,
        advantage_normalization="prompt",
        per_prompt_stat_tracking_buffer_size=32,
        save_total_limit=5,
    )
    arguments, config = parser.parse_args_and_config()
    if arguments.embedded:
        trainer = DDPOTrainer(config, colorfulness, common_animals(), load_emoji_pipeline())
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16, safety_checker=None)
        trainer = DDPOTrainer(config, LaionAesthetic(), common_animals(), pipeline)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
