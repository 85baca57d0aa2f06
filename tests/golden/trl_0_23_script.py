"""A script for TRL 0.23, of the shape of its own example. The migration test changes its imports and its pipeline."""

from dataclasses import dataclass, field

import numpy as np
from transformers import HfArgumentParser
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="runwayml/stable-diffusion-v1-5")
    pretrained_revision: str = field(default="main")
    use_lora: bool = field(default=True)


def scorer():
    def _fn(images, prompts, metadata):
        return images.float().mean((1, 2, 3)), {}

    return _fn


def prompt_fn():
    return np.random.choice(["cat", "dog"]), {}


def log_images(image_data, global_step, tracker):
    images, prompts, _, rewards, _ = image_data[-1]
    named = {
        f"{prompt} | {reward.item():.2f} | {index}": image.unsqueeze(0).float()
        for index, (image, prompt, reward) in enumerate(zip(images, prompts, rewards, strict=True))
    }
    tracker.log_images(named, step=global_step)


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, DDPOConfig))
    script_args, training_args = parser.parse_args_into_dataclasses()
    training_args.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
    pipeline = DefaultDDPOStableDiffusionPipeline(
        script_args.pretrained_model, pretrained_model_revision=script_args.pretrained_revision
    )
    trainer = DDPOTrainer(training_args, scorer(), prompt_fn, pipeline, image_samples_hook=log_images)
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()
