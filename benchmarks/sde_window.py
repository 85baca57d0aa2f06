"""
What a round costs by the size of its SDE window: `python benchmarks/sde_window.py`.

The sizes are interleaved and the medians of several rounds are printed, relative to training on all steps, since only
ratios taken in one run mean anything on a shared machine.
"""

import argparse
import contextlib
import io
import statistics
import tempfile

from diffusers.models.attention_processor import AttnProcessor

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.rewards import jpeg_compressibility


PROMPTS = ["cat face", "pizza", "tulip", "octopus"]


def make_trainer(window: int | None, steps: int, directory: str) -> DDPOTrainer:
    config = DDPOConfig(
        output_dir=directory,
        num_train_epochs=1,
        num_inference_steps=steps,
        guidance_scale=2.5,
        sde_window_size=window,
        sde_window_strategy="random",
        per_device_sample_batch_size=8,
        num_sample_batches=1,
        per_device_train_batch_size=8,
        one_pass=False,  # the figures are those of sampling and of training
        log_images_rounds=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    pipeline = load_emoji_pipeline()
    pipeline.unet.set_attn_processor(AttnProcessor())  # as in the demo: faster on a CPU
    return DDPOTrainer(config, jpeg_compressibility, PROMPTS, pipeline)


def seconds_of_a_round(trainer: DDPOTrainer) -> tuple[float, float]:
    """Sampling and training."""
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainer.train()
    log = next(log for log in trainer.state.log_history if "reward" in log)
    return log["time/sampling"], log["time/training"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--windows", type=int, nargs="+", default=[5, 2, 1])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        trainers = {window: make_trainer(window, arguments.steps, directory) for window in (None, *arguments.windows)}
        times: dict[int | None, list[tuple[float, float]]] = {window: [] for window in trainers}
        for repeat in range(arguments.repeats + 1):
            for window, trainer in trainers.items():
                taken = seconds_of_a_round(trainer)
                if repeat > 0:  # the first is warm-up
                    times[window].append(taken)
    medians = {
        window: [statistics.median(phase) for phase in zip(*taken, strict=True)] for window, taken in times.items()
    }
    whole = medians[None]
    print(f"{arguments.steps} denoising steps; seconds relative to training on all of them")
    for window, (sampling, training) in medians.items():
        print(
            f"window {'all' if window is None else window!s:>3}: sampling {sampling / whole[0]:.2f}, training "
            f"{training / whole[1]:.2f}, the round {(sampling + training) / sum(whole):.2f}"
        )


if __name__ == "__main__":
    main()
