"""
Learning curves of the demo, for docs/results.md: `make results`.

27 runs of `ddpo-trl demo`: three rewards, both estimators and a control with shuffled rewards, three seeds each, two
hours on two cores. Finished runs are kept in outputs/results and not repeated, so the command resumes after an
interruption. Figures and curves are written to benchmarks/results-DATE.json, and from there to the page and its
pictures; DATE is the day on which the last run ended. `--draw` starts no run and draws the seeds that are finished.
`--try` makes one run of one small round in outputs/results-try, and no page.
"""

import argparse
import csv
import datetime
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from ddpo_trl.artifacts.plots import ImageRow, save_comparison
from ddpo_trl.artifacts.record import ENVIRONMENT_NAME, METRICS_NAME, SAMPLES_FOLDER, fixed_images, round_folder
from ddpo_trl.cli.demo import parse_arguments
from ddpo_trl.demo import TASKS
from demo_runs import is_finished, make_all
from rounds import ROOT


KEPT = ROOT / "outputs" / "results"
FIGURES = ROOT / "benchmarks"
PICTURES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "results.md"

# A round has 256 images. `stop_at_gain` is out of reach, so that all runs make the same number of queries.
COMMON = [
    *("--bf16", "true", "--use_cpu", "true", "--num_sample_batches", "16", "--num_train_epochs", "6"),
    *("--stop_at_gain", "9"),
]
SEEDS = (0, 1, 2)

# One update instead of four is four times as large. The control takes the same steps as the score function.
LEARNING_RATES = {"is": 1e-3, "sf": 4e-3, "shuffled": 4e-3}
FLAGS = {
    "is": ["--loss_type", "is"],
    "sf": ["--loss_type", "sf"],
    "shuffled": ["--loss_type", "sf", "--shuffle_rewards", "true"],
}
NAMES = {"is": "IS", "sf": "SF", "shuffled": "SF, rewards shuffled"}
COLORS = {"is": "#1f6feb", "sf": "#1a7f37", "shuffled": "#6e7781"}

# Factors of these learning rates. Without guidance, as in the demo, images change more at the same rate.
SMALLER_STEPS = {"emoji_alignment": 0.5}
TITLES = {
    "jpeg_compressibility": "Compressibility",
    "jpeg_incompressibility": "Incompressibility",
    "emoji_alignment": "Alignment",
}

# Fixed prompts whose images are shown: two pictures of four columns, narrow enough for a phone.
SHOWN = (slice(0, 4), slice(4, 8))


# ---- The runs ----


class Run(NamedTuple):
    """One run of the demo."""

    task: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.kind}-{self.seed}"

    @property
    def folder(self) -> Path:
        return KEPT / self.name

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES[self.kind] * SMALLER_STEPS.get(self.task, 1.0)

    @property
    def own_flags(self) -> list[str]:
        """Flags that differ between kinds."""
        return [*FLAGS[self.kind], "--learning_rate", f"{self.learning_rate:g}"]

    @property
    def flags(self) -> list[str]:
        """All flags of `ddpo-trl demo` except the output directory."""
        return [*COMMON, *self.own_flags, "--reward", self.task, "--seed", str(self.seed)]


# For `--try`: one round of 16 images.
SMALL = ["--num_sample_batches", "1", "--num_train_epochs", "1"]

# Seed by seed: a seed is a complete comparison.
RUNS = [Run(task, kind, seed) for seed in SEEDS for task in TITLES for kind in FLAGS]


# ---- Figures ----


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    Figures of a run.

    Args:
        task (`str`):
            Name of the reward.
        kind (`str`):
            Key of `FLAGS`.
        seed (`int`):
            Seed of the run.
        queries (`list[int]` of length `R`):
            Reward queries at the end of each round.
        reward (`list[float]` of length `R`):
            Mean reward of each round's images, which were sampled before its updates.
        before (`float`):
            Evaluation reward before training.
        after (`float`):
            Evaluation reward after training.
        gain (`float`):
            Mean of the paired differences of the evaluation images.
        gain_stderr (`float`):
            Standard error of the gain.
        recognized_before (`float`):
            Share of the evaluation images, in [0, 1], that are nearest to their own subject.
        recognized_after (`float`):
            The same after training.
        recognized_gain_stderr (`float`):
            Standard error of the difference.
        seconds (`float`):
            Seconds of training per 1000 reward queries.
    """

    task: str
    kind: str
    seed: int
    queries: list[int]
    reward: list[float]
    before: float
    after: float
    gain: float
    gain_stderr: float
    recognized_before: float
    recognized_after: float
    recognized_gain_stderr: float
    seconds: float

    @property
    def gain_in_stderr(self) -> float:
        return in_stderr(self.gain, self.gain_stderr)

    @property
    def recognized_gain(self) -> float:
        return self.recognized_after - self.recognized_before

    @property
    def recognized_gain_in_stderr(self) -> float:
        return in_stderr(self.recognized_gain, self.recognized_gain_stderr)


def in_stderr(gain: float, stderr: float) -> float:
    """Divide a gain by its standard error; 0 if no image differs, where the standard error is 0 too."""
    return gain / stderr if gain else 0.0


def read(run: Run) -> Result:
    """
    Read the figures of a finished run.

    Raises:
        `ValueError`: If the run was made with other flags.
    """
    summary = json.loads((run.folder / "summary.json").read_text())
    config = parse_arguments(run.flags)[1].to_dict()
    names = {flag.removeprefix("--") for flag in run.flags if flag.startswith("--")} & config.keys()
    others = [f"{name}={summary['config'][name]}" for name in sorted(names) if summary["config"][name] != config[name]]
    if others:
        raise ValueError(f"{run.folder} was made with other flags: {', '.join(others)}. Remove it.")
    with (run.folder / METRICS_NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Result(
        task=run.task,
        kind=run.kind,
        seed=run.seed,
        queries=[round(float(row["episode"])) for row in rows],
        reward=[digits(float(row["reward"])) for row in rows],
        before=digits(summary["eval_reward_before"]),
        after=digits(summary["eval_reward_after"]),
        gain=digits(summary["eval_reward_gain"]),
        gain_stderr=digits(summary["eval_reward_gain_stderr"]),
        recognized_before=digits(summary["recognized_before"]),
        recognized_after=digits(summary["recognized_after"]),
        recognized_gain_stderr=digits(summary["recognized_gain_stderr"]),
        seconds=digits(1000 * summary["seconds"]["total"] / summary["reward_queries"]),
    )


def digits(value: float) -> float:
    """Round to six significant digits."""
    return float(f"{value:.6g}")


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """Collect all figures of the page and the curves for the JSON file; `results` has an entry for each run."""
    ends = [(run.folder / "summary.json").stat().st_mtime for run in runs]
    return {
        "date": datetime.date.fromtimestamp(max(ends)).isoformat(),
        "machine": same([json.loads((run.folder / ENVIRONMENT_NAME).read_text()) for run in runs]),
        "results": [asdict(read(run)) for run in runs],
    }


def same(environments: Sequence[dict[str, str]]) -> dict[str, str]:
    """Merge the environments of all runs; values that differ are joined."""
    return {name: ", ".join(sorted({environment[name] for environment in environments})) for name in environments[0]}


def complete_seeds(runs: Iterable[Run]) -> list[Run]:
    """Return the runs of the seeds for which all runs are finished."""
    unfinished = {run.seed for run in runs if not is_finished(run.folder)}
    return [run for run in runs if run.seed not in unfinished]


def band(curves: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """Compute the lowest, mean and highest value of each round, `(R, 3)`, from one curve per seed, `(S, R)`."""
    return [(min(rewards), mean(rewards), max(rewards)) for rewards in zip(*curves, strict=True)]


# ---- Pictures ----


def draw_curves(results: Sequence[Result], unit: str, path: Path) -> None:
    """Draw the mean and range over seeds of the reward against reward queries, large enough to read on a phone."""
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for kind, seeds in by_kind(results).items():
        queries = seeds[0].queries
        lowest, middle, highest = zip(*band([result.reward for result in seeds]), strict=True)
        axes.fill_between(queries, lowest, highest, color=COLORS[kind], alpha=0.18, linewidth=0)
        axes.plot(queries, middle, marker="o", markersize=3.5, color=COLORS[kind], label=NAMES[kind])
    axes.set_xticks(queries)
    axes.set_xlabel("reward queries (images scored)")
    axes.set_ylabel(f"mean reward per round, {unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def by_kind(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group the results by kind."""
    return {kind: [result for result in results if result.kind == kind] for kind in FLAGS}


def draw_images(task: str, seed: int) -> None:
    """Draw images before training, after IS and after SF, with the same prompts and seeds."""
    folders = {"before": round_folder(Run(task, "is", seed).folder, 0)}
    for kind in ("is", "sf"):
        samples = Run(task, kind, seed).folder / SAMPLES_FOLDER
        folders[f"after {NAMES[kind]}"] = max(path for path in samples.glob("round-*") if path.is_dir())
    entries = {title: dict(fixed_images(folder)) for title, folder in folders.items()}
    shared = [of for of in entries["before"] if all(of in row for row in entries.values())]
    for index, part in enumerate(SHOWN):
        rows = [
            ImageRow(
                title=title,
                images=[Image.open(folders[title] / row[of]["file"]) for of in shared[part]],
                rewards=[row[of]["reward"] for of in shared[part]],
            )
            for title, row in entries.items()
        ]
        save_comparison(rows, [prompt for prompt, _ in shared[part]], PICTURES / images_name(task, index))


def curves_name(task: str) -> str:
    return f"results-{task}.png"


def images_name(task: str, index: int) -> str:
    return f"results-{task}-images-{index + 1}.png"


# ---- The page ----

PAGE_TEXT = """\
# Results

Written by `make results` from {runs} runs of the demo, the last one on {date}. Their figures and curves are in
`benchmarks/{file}`.
{reading}
## Runs

Three rewards on the embedded pipeline, with the seeds {seeds}; for each, both estimators of the paper, importance
sampling with clipping (IS) and the score function (SF), and a control with the rewards of each round shuffled among
its images. Each run is this command,

```bash
{command}
```

with the flags of its kind:

{kinds}

With `emoji_alignment` the learning rates are half of these. SF makes one update instead of four, with four times the
learning rate.

- **Curves** show the mean reward of the images that a round trains on. They are sampled before its updates: the first
  point is before any training, the last one, at {queries} queries, after training on {learned}. Lines are means over
  the seeds; bands extend from the lowest to the highest seed.
- **Evaluation** compares images of the same prompts and seeds before and after training, generated with the pipeline's
  own scheduler. The standard error of a gain is that of the mean of one run's paired differences.
- **Recognized** is the share of these images that are nearest to their own subject among all training images. No
  reward uses it.
- **Images** are those of the first eight evaluation prompts, with seed {first_seed}, each with its reward below.

Machine: {machine[device]}, {machine[platform]}, with Python {machine[python]}, torch {machine[torch]} and
diffusers {machine[diffusers]}.
{tasks}
## Cost

Seconds of training per 1000 reward queries, for the fastest seed:

{cost}

Several runs were made at a time, with one thread each, on a machine that was also doing other work. This can only add
time, so the fastest seed is shown; compare the ratios to IS, not the seconds. SF computes its gradients
[while sampling](speed.md), IS afterwards.
"""

# Written by hand for the runs of this day. The figures are filled in; test_results.py checks the statements. The page
# of other runs has no such section until someone writes it.
READING_DATE = "2026-11-25"
READING = """
## Findings

- **Both estimators learn all three rewards with every seed.** Each gain is at least {least} standard errors, and
  larger than that of any control with the same reward: {margins}. With incompressibility the
  difference is small: the bands of IS and of the control overlap.
- **The control learns nothing, but its weights drift**, because its steps are as large as SF's. With the JPEG rewards
  its evaluation reward changed by {jpeg_walk} standard errors; with alignment every seed fell, by {alignment_walk}.
  The standard error covers only the images of one run, not this drift: compare gains with those of the control. (The
  two JPEG controls with the same seed are not independent. Their shuffles are the same and their rewards opposite, and
  they moved the images in opposite directions. IS, with smaller steps, has no control of its own here.)
- **SF's one large update gained more than IS's four small ones in all {pairs} pairs**, {ratios} times as much from the
  same number of queries. This does not rank the estimators: IS is clipped, and the learning rates are related only by
  the factor of four.
- **SF also lost more**: of the images trained for compressibility, {recognized_sf} are recognized after SF,
  {recognized_is} after IS. [Pitfalls](pitfalls.md) shows what happens next.
- **Alignment does not only exploit its reward**: a measure that is not part of the reward recognizes more images after
  IS (by {judge_is} of all images) and after SF (by {judge_sf}), and fewer after the control (by {judge_control}).
"""

TASK_TEXT = """
## {title}

`{task}`, in {unit}, evaluated on {images} images:

![Mean reward of each round against reward queries, for IS, SF and SF with rewards shuffled]({curves})

{table}

<div class="pictures" markdown>
{pictures}
</div>
"""


def page(figures: dict[str, Any]) -> str:
    """Write the documentation page from the result of [`collect`]."""
    results = [Result(**entry) for entry in figures["results"]]
    seeds = sorted({result.seed for result in results})
    queries = results[0].queries
    tasks = {task: [result for result in results if result.task == task] for task in TITLES}
    return PAGE_TEXT.format(
        runs=len(results),
        date=figures["date"],
        file=file_name(figures),
        reading=reading(tasks) if figures["date"] == READING_DATE else "",
        seeds=", ".join(map(str, seeds)),
        first_seed=seeds[0],
        command=shell(["ddpo-trl", "demo", *COMMON, "--reward", "REWARD", "--seed", "SEED"]),
        kinds="\n".join(kinds_table()),
        queries=f"{queries[-1]:,}",
        learned=f"{queries[-2]:,}",
        machine=figures["machine"],
        tasks="".join(task_section(task, some) for task, some in tasks.items()),
        cost="\n".join(cost_table(tasks)),
    )


def reading(tasks: dict[str, list[Result]]) -> str:
    """Fill the figures into `READING`."""
    kinds = {task: by_kind(results) for task, results in tasks.items()}
    learners = {task: [*some["is"], *some["sf"]] for task, some in kinds.items()}
    controls = {task: some["shuffled"] for task, some in kinds.items()}
    pairs = [pair for some in kinds.values() for pair in zip(some["is"], some["sf"], strict=True)]
    margins = [
        f"{min(result.gain for result in learners[task]):+.3f} versus {max(result.gain for result in some):+.3f} "
        f"{TASKS[task].unit}"
        for task, some in controls.items()
    ]
    jpeg_controls = [*controls["jpeg_compressibility"], *controls["jpeg_incompressibility"]]
    compressed, aligned = kinds["jpeg_compressibility"], kinds["emoji_alignment"]
    fields = {
        "least": f"{min(result.gain_in_stderr for some in learners.values() for result in some):.1f}",
        "margins": ", ".join(margins),
        "jpeg_walk": spread((result.gain_in_stderr for result in jpeg_controls), "+.1f"),
        "alignment_walk": spread((-result.gain_in_stderr for result in controls["emoji_alignment"]), ".1f"),
        "pairs": f"{len(pairs)}",
        "ratios": spread((sf.gain / is_.gain for is_, sf in pairs), ".1f"),
        "recognized_is": spread((100 * result.recognized_after for result in compressed["is"]), ".0f") + "%",
        "recognized_sf": spread((100 * result.recognized_after for result in compressed["sf"]), ".0f") + "%",
        "judge_is": spread((100 * result.recognized_gain for result in aligned["is"]), ".0f") + "%",
        "judge_sf": spread((100 * result.recognized_gain for result in aligned["sf"]), ".0f") + "%",
        "judge_control": spread((-100 * result.recognized_gain for result in aligned["shuffled"]), ".0f") + "%",
    }
    return READING.format(**{name: text.replace("-", "−") for name, text in fields.items()})


def spread(values: Iterable[float], form: str) -> str:
    """Format the lowest and the highest value."""
    ordered = sorted(values)
    return f"{ordered[0]:{form}} to {ordered[-1]:{form}}"


def file_name(figures: dict[str, Any]) -> str:
    return f"results-{figures['date']}.json"


def shell(words: Sequence[str], width: int = 100) -> str:
    """Break a command into lines that end in a backslash; a flag stays on the line of its value."""
    lines = [words[0]]
    for word, following in zip(words[1:], [*words[2:], ""], strict=True):
        needed = len(f" {word} {following}") if word.startswith("--") else len(f" {word}")
        if len(lines[-1]) + needed > width - 2:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)


def kinds_table() -> list[str]:
    lines = ["| | flags | updates per round |", "|---|---|---|"]
    for kind in FLAGS:
        run = Run("jpeg_compressibility", kind, 0)
        updates, images = updates_of(run)
        flags = " ".join(
            f"`{flag} {value}`" for flag, value in zip(run.own_flags[::2], run.own_flags[1::2], strict=True)
        )
        lines.append(f"| {NAMES[kind]} | {flags} | {updates} of {images} images |")
    return lines


def updates_of(run: Run) -> tuple[int, int]:
    """Return the updates per round and the images per update."""
    config = parse_arguments(run.flags)[1]
    samples = config.per_device_sample_batch_size * config.num_sample_batches
    return config.updates_per_round, samples * config.num_ppo_epochs // config.updates_per_round


def task_section(task: str, results: Sequence[Result]) -> str:
    return TASK_TEXT.format(
        title=TITLES[task],
        task=task,
        unit=TASKS[task].unit,
        images=len(TASKS[task].captions) * TASKS[task].eval_seeds,
        curves=f"images/{curves_name(task)}",
        table="\n".join(results_table(results)),
        pictures="\n".join(
            f"![Images before training, after IS and after SF](images/{images_name(task, index)})"
            for index in range(len(SHOWN))
        ),
    )


def results_table(results: Sequence[Result]) -> list[str]:
    """Table of the means over seeds, and of the figures of each seed, in the order of the seeds."""
    lines = [
        "| | evaluation reward | gain (lowest to highest seed) | gain of each seed, in standard errors | recognized "
        "| change for each seed, in standard errors |",
        "|---|---|---|---|---|---|",
    ]
    for kind, seeds in by_kind(results).items():
        gains = [result.gain for result in seeds]
        before, after = mean(result.before for result in seeds), mean(result.after for result in seeds)
        known = [result.recognized_before for result in seeds], [result.recognized_after for result in seeds]
        cells = [
            NAMES[kind],
            f"{before:.3f} → {after:.3f}",
            f"{mean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})",
            ", ".join(f"{result.gain_in_stderr:+.1f}" for result in seeds),
            f"{mean(known[0]):.0%} → {mean(known[1]):.0%}",
            ", ".join(f"{result.recognized_gain_in_stderr:+.1f}" for result in seeds),
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("-", "−"))
    return lines


def cost_table(tasks: dict[str, list[Result]]) -> list[str]:
    lines = [f"| | {' | '.join(NAMES.values())} |", f"|---|{'---|' * len(NAMES)}"]
    for task, results in tasks.items():
        seconds = {kind: min(result.seconds for result in some) for kind, some in by_kind(results).items()}
        cells = [f"{some:.0f} s, {some / seconds['is']:.2f} of IS" for some in seconds.values()]
        cells[0] = f"{seconds['is']:.0f} s"
        lines.append(f"| {TITLES[task]} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="start no run, draw the seeds that are finished")
    parser.add_argument("--try", action="store_true", dest="small", help="make one small run and no page")
    arguments = parser.parse_args()
    commands = {run.folder: run.flags for run in RUNS}
    if arguments.small:
        shutil.rmtree(folder := KEPT.with_name("results-try"), ignore_errors=True)
        commands = {folder / "sf": [*Run("jpeg_compressibility", "sf", 0).flags, *SMALL]}
    try:
        make_all({} if arguments.draw else commands)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    if arguments.small:
        return
    runs = complete_seeds(RUNS)
    if not runs:
        raise SystemExit(f"{KEPT} has no seed for which all runs are finished.")
    figures = collect(runs)
    (FIGURES / file_name(figures)).write_text(json.dumps(figures, indent=1) + "\n")
    results = [Result(**entry) for entry in figures["results"]]
    for task in TITLES:
        of_task = [result for result in results if result.task == task]
        draw_curves(of_task, TASKS[task].unit, PICTURES / curves_name(task))
        draw_images(task, runs[0].seed)
    PAGE.write_text(page(figures))


if __name__ == "__main__":
    main()
