"""
Score function compared with importance sampling: the same number of reward queries for both, in one figure.

```bash
python examples/sf_vs_is.py  # embedded pipeline on a CPU: a few minutes on two cores
python examples/sf_vs_is.py --total_episodes 2560 --seed 1
```

As in the paper, importance sampling makes four optimizer steps per round. The score function is unbiased only for the
first step, so it makes a single larger one. The figure is `sf_vs_is.png` in the output folder.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.rewards import jpeg_compressibility


PROMPTS = ["mushroom", "squid", "hamburger", "blossom", "snake", "taco", "spider", "strawberry"]
LABELS = {"is": "importance sampling", "sf": "score function"}


@dataclass
class ScriptArguments:
    sf_learning_rate: float = field(
        default=2e-3, metadata={"help": "For the score function; --learning_rate is for importance sampling."}
    )


def main() -> None:
    parser = TrlParser([ScriptArguments, DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/sf-vs-is",
        total_episodes=1280,
        num_inference_steps=5,
        guidance_scale=2.5,
        train_timestep_range=[0.0, 0.6],
        per_device_sample_batch_size=16,
        num_sample_batches=8,
        num_images_per_prompt=16,
        advantage_normalization="group",
        per_device_train_batch_size=16,
        num_mini_batches=4,
        learning_rate=1e-3,
        cliprange=5e-3,
        save_strategy="no",
    )
    arguments, config = parser.parse_args_and_config()
    settings = {
        "is": {},
        "sf": {"loss_type": "sf", "num_mini_batches": 1, "learning_rate": arguments.sf_learning_rate},
    }
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="reward queries (images scored)", ylabel="JPEG compressibility [kB]")
    for name, differences in settings.items():
        own = dataclasses.replace(config, output_dir=f"{config.output_dir}/{name}", **differences)
        trainer = DDPOTrainer(own, jpeg_compressibility, PROMPTS, load_emoji_pipeline())
        trainer.train()
        logs = [log for log in trainer.state.log_history if "reward" in log]
        axes.plot([log["episode"] for log in logs], [log["reward"] for log in logs], marker="o", label=LABELS[name])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(Path(config.output_dir) / "sf_vs_is.png", dpi=150)


if __name__ == "__main__":
    main()
