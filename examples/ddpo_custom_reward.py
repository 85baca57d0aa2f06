"""
DDPO with a custom reward function, on the embedded pipeline and a CPU.

```bash
python examples/ddpo_custom_reward.py
python examples/ddpo_custom_reward.py --total_episodes 1024 --loss_type sf --output_dir outputs/red-sf
```
"""

from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline


PROMPTS = ["cat face", "pizza", "tulip", "octopus", "frog", "penguin", "hamburger", "cactus"]


def redness(images, prompts, metadata):
    """Mean red value of each image minus the mean of green and blue, in [-1, 1]."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def main() -> None:
    parser = TrlParser([DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/red-emoji",
        total_episodes=320,
        learning_rate=3e-3,
        num_inference_steps=10,
        guidance_scale=3.0,
        train_timestep_range=[0.0, 0.8],
        per_device_sample_batch_size=16,
        num_sample_batches=2,
        num_images_per_prompt=4,
        advantage_normalization="group",
        per_device_train_batch_size=16,
        num_mini_batches=1,
        save_strategy="no",
    )
    (config,) = parser.parse_args_and_config()
    trainer = DDPOTrainer(config, redness, PROMPTS, load_emoji_pipeline())
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
