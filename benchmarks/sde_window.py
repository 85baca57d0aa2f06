"""
Time per round for several sizes of the SDE window: `python benchmarks/sde_window.py`.

The sizes are interleaved and the medians of several rounds are printed, relative to training on all steps, because on
a shared machine only ratios within one run are meaningful.
"""

import argparse
import statistics

from ddpo_trl import DDPOTrainer
from ddpo_trl.rewards import jpeg_compressibility
from rounds import emoji_trainer, log_of_a_round


def make_trainer(window: int | None, steps: int) -> DDPOTrainer:
    return emoji_trainer(
        jpeg_compressibility,
        num_inference_steps=steps,
        sde_window_size=window,
        sde_window_strategy="random",
        num_sample_batches=1,
    )


def seconds_of_a_round(trainer: DDPOTrainer) -> tuple[float, float]:
    """Run a round, and return the seconds of sampling and of training."""
    log = log_of_a_round(trainer)
    return log["time/sampling"], log["time/training"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--windows", type=int, nargs="+", default=[5, 2, 1])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    trainers = {window: make_trainer(window, arguments.steps) for window in (None, *arguments.windows)}
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
