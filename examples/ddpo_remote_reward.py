"""
A reward from another process or machine, for models that need their own GPU, packages or process.

```bash
# On the machine with the reward model. Both sides read the token from the environment.
export DDPO_TRL_REWARD_TOKEN=$(openssl rand -hex 32)
ddpo-trl serve-reward ddpo_trl.rewards:LaionAesthetic --host 0.0.0.0 --port 8000

# On the machine with the pipeline.
python examples/ddpo_remote_reward.py --url http://reward-machine:8000

# On a CPU, without a download: both on this machine, with the emoji pipeline.
ddpo-trl serve-reward ddpo_trl.rewards:colorfulness &
python examples/ddpo_remote_reward.py --embedded --num_inference_steps 10 --num_train_epochs 5
```

Rewards are computed during sampling: a slow reward costs no time as long as it is faster than sampling.
"""

from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionPipeline
from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.prompts import common_animals
from ddpo_trl.rewards import RemoteReward


@dataclass
class ScriptArguments:
    url: str = field(default="http://127.0.0.1:8000", metadata={"help": "URL of the reward server."})
    model: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Pipeline to train: Hub id or folder."},
    )
    embedded: bool = field(default=False, metadata={"help": "Train the emoji pipeline, without a download."})


def main() -> None:
    parser = TrlParser([ScriptArguments, DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/remote-reward",
        num_train_epochs=100,
        num_inference_steps=50,
        per_device_sample_batch_size=8,
        num_sample_batches=8,
        num_images_per_prompt=8,
        advantage_normalization="group",
        per_device_train_batch_size=8,
        num_mini_batches=2,
        on_invalid_reward="drop",
        reward_timeout=300.0,
    )
    arguments, config = parser.parse_args_and_config()
    reward = RemoteReward(arguments.url)
    if arguments.embedded:
        pipeline = load_emoji_pipeline()
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16, safety_checker=None)
    trainer = DDPOTrainer(config, reward, common_animals(), pipeline)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
