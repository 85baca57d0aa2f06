"""
Time and memory of a round as a function of its size: `make scaling`, 9 minutes with nothing else running.

Rounds of the real trainer on the embedded pipeline, with one pass and with two passes, varying one size at a time from
a base point: samples, denoising steps, latents, LoRA rank. Rounds of all points are interleaved. Medians are reported
relative to the base point, with minimum and maximum. A straight line is fitted to each size, and the largest deviation
from it is printed. Startup is not included.

The same samples are also computed by one process, by two processes, and by two independent trainers with half of the
samples each, which shows what the machine allows. Each process has one thread and so the same hardware. Writes
outputs/scaling.json and outputs/scaling.png; dated copies are in benchmarks/ and docs/images.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import io
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rounds import LEARNING_RATE, PROMPTS, ROOT, Child, machine, quiet_config, resident_bytes, runs_folder


PASSES = ("one pass", "two passes")
PIXELS = 4  # image pixels per latent position of the embedded pipeline, along each side
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"  # its backward pass has the suffix _backward


class Point(NamedTuple):
    """Size of a round; `side` is the width and height of the latents."""

    samples: int = 8
    steps: int = 4
    side: int = 16
    rank: int = 4
    batch_size: int = 8


class Axis(NamedTuple):
    """A varied size, and its points by their position on the axis."""

    title: str
    points: dict[int, Point]


class Team(NamedTuple):
    """Processes that share the samples of a round, as one run (`together`) or with independent trainers."""

    processes: int
    threads: int
    together: bool = True


BASE = Point()
AXES = {
    "samples": Axis("samples per round", {size: BASE._replace(samples=size) for size in (8, 16, 24, 32)}),
    "steps": Axis("denoising steps", {size: BASE._replace(steps=size) for size in (2, 4, 8, 12)}),
    "latents": Axis("latent positions", {side**2: BASE._replace(side=side) for side in (8, 16, 24, 32)}),
    "rank": Axis("LoRA rank", {size: BASE._replace(rank=size) for size in (2, 4, 16, 64)}),
}
SHARED = BASE._replace(batch_size=4)  # so that two processes can share it
TEAMS = {
    "one process": Team(1, threads=1),
    "two processes": Team(2, threads=1),
    "two trainers apart": Team(2, threads=1, together=False),
}


# ---- Child processes ----


def make_config(point: Point, one_pass: bool, processes: int = 1) -> Any:
    """Create the config of one round that is divided among the processes."""
    return quiet_config(
        output_dir=os.path.join(os.environ["RUNS_FOLDER"], f"{'-'.join(map(str, point))}-{one_pass}"),
        use_cpu=True,
        num_train_epochs=1,
        num_inference_steps=point.steps,
        pipeline_kwargs={"height": PIXELS * point.side, "width": PIXELS * point.side},
        learning_rate=LEARNING_RATE,
        per_device_sample_batch_size=point.batch_size,
        num_sample_batches=point.samples // point.batch_size // processes,
        per_device_train_batch_size=point.batch_size,
        one_pass=one_pass,
    )


@functools.cache
def pipeline_of(rank: int, one_pass: bool) -> Any:
    """Load a pipeline for trainers of all sizes, one per number of passes: DDP leaves hooks on the weights."""
    from ddpo_trl import load_emoji_pipeline
    from ddpo_trl.policy.lora import add_adapter, default_lora_config

    pipeline = load_emoji_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    lora = default_lora_config(pipeline.unet)
    lora.r = lora.lora_alpha = rank
    add_adapter(pipeline, lora)
    return pipeline


class Rounds:
    """A trainer that runs one round per request."""

    def __init__(self, point: Point, passes: str, processes: int):
        from transformers import TrainerCallback

        from ddpo_trl import DDPOTrainer
        from ddpo_trl.rewards import brightness

        class Stopwatch(TrainerCallback):
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.start = time.perf_counter()

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.seconds = time.perf_counter() - self.start

        self.stopwatch = Stopwatch()
        one_pass = passes == "one pass"
        config, pipeline = make_config(point, one_pass, processes), pipeline_of(point.rank, one_pass)
        self.trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline, callbacks=[self.stopwatch])
        if self.trainer.plan.one_pass != one_pass:
            raise RuntimeError(f"{point} is not trained with {passes}: {self.trainer.plan.one_pass_disabled_reason}")

    def planned(self) -> float:
        """Return the planned MiB of a round's samples on this process."""
        return self.trainer.plan.rollout_bytes / 2**20

    def seconds(self) -> float:
        """Measure the seconds of a round."""
        self.trainer.train()
        return self.stopwatch.seconds

    def peak(self) -> float:
        """Measure the peak MiB that a round adds to the resident memory before it; Linux only."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the round would reuse memory that earlier ones freed
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.trainer.train()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 2**10 - before / 2**20

    def attention(self) -> float:
        """Measure the share of a round's time that is spent in scaled dot-product attention."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            seconds = self.seconds()
        taken = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
        return (taken[ATTENTION] + taken[f"{ATTENTION}_backward"]) / seconds


FIGURES: dict[str, Callable[[Rounds], float]] = {
    "planned": Rounds.planned,
    "peak": Rounds.peak,
    "attention": Rounds.attention,
    "seconds": Rounds.seconds,
}


def serve(points: Sequence[Point], processes: int) -> None:
    """Answer each line on the standard input with a figure; runs in a child process."""
    answers = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainers = {(point, passes): Rounds(point, passes, processes) for point in points for passes in PASSES}
        print('"ready"', file=answers, flush=True)
        for line in sys.stdin:
            figure, index, passes = json.loads(line)
            print(FIGURES[figure](trainers[points[index], passes]), file=answers, flush=True)


# ---- Measurement ----


class Children:
    """Processes of a team, with a trainer for each point and number of passes."""

    def __init__(self, team: Team, points: Sequence[Point]):
        self.points = list(points)
        apart = 1 if team.together else team.processes
        own = [point._replace(samples=point.samples // apart) for point in self.points]
        sizes = ["--points", json.dumps(own), "--processes", str(team.processes // apart)]
        command = [sys.executable, __file__, *sizes]
        self.processes = [Child(command, environment) for environment in environments(team)]

    def wait(self) -> None:
        """Wait until all processes are ready."""
        for process in self.processes:
            process.answer()

    def figure(self, name: str, point: Point, passes: str) -> float:
        """Request a figure from all processes at once, and return the largest."""
        for process in self.processes:
            process.ask(json.dumps([name, self.points.index(point), passes]))
        return max(process.answer() for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.end()


def environments(team: Team) -> list[dict[str, str]]:
    """Build the environment of each process, with the variables of `accelerate launch` if they form one run (gloo)."""
    common = {
        **os.environ,
        "OMP_NUM_THREADS": str(team.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "KINETO_LOG_LEVEL": "99",  # the profiler logs each start and stop
    }
    folders = [{"RUNS_FOLDER": tempfile.mkdtemp(dir=runs_folder().name)} for _ in range(team.processes)]
    if team.processes == 1 or not team.together:
        return [{**common, **folder} for folder in folders]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(team.processes)}
    together |= {"ACCELERATE_USE_CPU": "true", **folders[0]}  # processes of a run share a folder
    return [{**common, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(team.processes)]


class Subject(NamedTuple):
    """A point to measure, its processes, and whether to measure the share of attention."""

    children: Children
    point: Point
    attention: bool = False


Figures = dict[str, dict[str, list[float]]]  # of one subject, by passes and name


def measure(subjects: Sequence[Subject], repeats: int) -> list[Figures]:
    """Measure all figures of each subject; the first rounds measure memory and are warm-up."""
    found: list[Figures] = [{passes: {name: [] for name in FIGURES} for passes in PASSES} for _ in subjects]
    for name in (*FIGURES, *["seconds"] * (repeats - 1)):
        for subject, figures in zip(subjects, found, strict=True):
            for passes in PASSES if name != "attention" or subject.attention else ():
                figures[passes][name].append(subject.children.figure(name, subject.point, passes))
    return found


def run_all(axes: Sequence[str], repeats: int) -> tuple[dict[str, dict[str, Figures]], dict[str, Figures]]:
    """Measure everything; returns the figures by axis and position, and the figures by team."""
    points = list(dict.fromkeys(point for axis in axes for point in AXES[axis].points.values()))
    alone = Children(Team(1, torch.get_num_threads()), points)
    teams = {name: Children(team, [SHARED]) for name, team in TEAMS.items()}
    for children in (alone, *teams.values()):
        children.wait()
    places = [(axis, str(number)) for axis in axes for number in AXES[axis].points]
    subjects = [Subject(alone, AXES[axis].points[int(number)], axis == "latents") for axis, number in places]
    found = measure([*subjects, *(Subject(children, SHARED) for children in teams.values())], repeats)
    for children in (alone, *teams.values()):
        children.end()
    by_axis: dict[str, dict[str, Figures]] = {axis: {} for axis in axes}
    for (axis, number), figures in zip(places, found, strict=False):
        by_axis[axis][number] = figures
    return by_axis, dict(zip(teams, found[len(places) :], strict=True))


# ---- Summary ----


class Line(NamedTuple):
    """y = start + slope · x, and the largest deviation of a point from it, relative to the point's y."""

    start: float
    slope: float
    deviation: float


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """
    Fit a straight line by least squares.

    Args:
        xs, ys (`Sequence[float]` of length `N` >= 2):
            Coordinates of the points; y > 0.
    """
    slope, start = statistics.linear_regression(xs, ys)
    return Line(start, slope, max(abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True)))


def summary(figures: Figures, base: dict[str, float]) -> dict[str, dict[str, float]]:
    """Summarize a point by passes: time relative to the base, MiB, and the share of attention if it was measured."""
    summaries: dict[str, dict[str, float]] = {}
    for passes, values in figures.items():
        times = [seconds / base[passes] for seconds in values["seconds"]]
        summaries[passes] = {
            "ratio": statistics.median(times),
            "from": min(times),
            "to": max(times),
            "planned_MiB": values["planned"][0],
            "peak_MiB": values["peak"][0],
        }
        if values["attention"]:
            summaries[passes]["attention_share"] = values["attention"][0]
    return summaries


def base_seconds(figures: Sequence[Figures]) -> dict[str, float]:
    """Compute the median by passes of all rounds of a point that was measured on several axes."""
    return {
        passes: statistics.median([seconds for each in figures for seconds in each[passes]["seconds"]])
        for passes in PASSES
    }


def summarize(by_axis: dict[str, dict[str, Figures]], by_team: dict[str, Figures]) -> dict[str, Any]:
    at_base = [by_axis[axis][str(x)] for axis in by_axis for x, point in AXES[axis].points.items() if point == BASE]
    base, one_process = base_seconds(at_base), base_seconds([by_team["one process"]])
    axes: dict[str, Any] = {}
    for axis, by_number in by_axis.items():
        points = {number: summary(figures, base) for number, figures in by_number.items()}
        axes[axis] = {"title": AXES[axis].title, "points": points, "lines": lines_of(points)}
    return {
        "base": BASE._asdict(),
        "axes": axes,
        "shared": SHARED._asdict(),
        "processes": {name: summary(figures, one_process) for name, figures in by_team.items()},
        "figures": {"axes": by_axis, "processes": by_team},
    }


def lines_of(points: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Fit a line for each number of passes, and for the time without attention if that was measured."""
    numbers = [float(number) for number in points]
    lines = {}
    for passes in PASSES:
        times = [summaries[passes]["ratio"] for summaries in points.values()]
        shares = [summaries[passes].get("attention_share") for summaries in points.values()]
        lines[passes] = fit_line(numbers, times)._asdict()
        if None not in shares:
            rest = [time * (1 - share) for time, share in zip(times, shares, strict=True)]
            lines[f"{passes} without attention"] = fit_line(numbers, rest)._asdict()
    return lines


# ---- Table and picture ----


HEADINGS = (*PASSES, "kept, MiB: one, two", "peak, MiB: one, two")


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=119)
    table = Table(title=f"time per round, base point = 1: {described(results['base'])}")
    for heading in ("", "", *HEADINGS):
        table.add_column(heading, justify="right")
    for axis in results["axes"].values():
        for number, summaries in axis["points"].items():
            table.add_row(axis["title"], number, *cells(summaries))
        table.add_section()
    console.print(table)
    for axis in results["axes"].values():
        for name, line in axis["lines"].items():
            print(
                f"{axis['title']:<17} {name:<29} {line['start']:.3f} + {line['slope']:.5f} x, largest "
                f"deviation {line['deviation']:.1%}"
            )
        for number, summaries in axis["points"].items():
            if shares := [
                f"{each['attention_share']:.1%}" for each in summaries.values() if "attention_share" in each
            ]:
                print(f"{axis['title']:<17} {number}: attention takes {' and '.join(shares)}")
    table = Table(title=f"the same samples, one thread per process, one process = 1: {described(results['shared'])}")
    for heading in ("", *HEADINGS):
        table.add_column(heading, justify="right")
    for name, summaries in results["processes"].items():
        table.add_row(name, *cells(summaries))
    console.print(table)


def described(point: dict[str, int]) -> str:
    side = point["side"]
    return (
        f"{point['samples']} samples in batches of {point['batch_size']}, {point['steps']} steps, {side}x{side} "
        f"latents, rank {point['rank']}"
    )


def cells(summaries: dict[str, dict[str, float]]) -> list[str]:
    of_passes = [summaries[passes] for passes in PASSES]
    return [
        *(f"{each['ratio']:.2f} ({each['from']:.2f}-{each['to']:.2f})" for each in of_passes),
        " ".join(f"{each['planned_MiB']:9.3g}" for each in of_passes),
        " ".join(f"{each['peak_MiB']:9.0f}" for each in of_passes),
    ]


COLORS = {"one pass": "#1a7f37", "two passes": "#1f6feb"}


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    from ddpo_trl.artifacts.plots import save

    figure = Figure(figsize=(6.4, 8), layout="constrained")
    panels = figure.subplots(3, 2).flat
    for axes, axis in zip(panels, results["axes"].values(), strict=False):
        draw_axis(axes, axis)
    draw_processes(panels[4], results["processes"])
    panels[5].set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    more = panels[4].get_legend_handles_labels()
    panels[5].legend([*handles, *more[0]], [*labels, *more[1]], frameon=False, loc="center", fontsize=11)
    for axes in panels[:5]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=10)
    figure.supylabel("relative time per round", fontsize=12)
    save(figure, path)


def draw_axis(axes: Any, axis: dict[str, Any]) -> None:
    numbers = [int(number) for number in axis["points"]]
    for passes, color in COLORS.items():
        each = [summaries[passes] for summaries in axis["points"].values()]
        times = [point["ratio"] for point in each]
        errors = [[p["ratio"] - p["from"] for p in each], [p["to"] - p["ratio"] for p in each]]
        axes.errorbar(numbers, times, errors, fmt="o", ms=5, capsize=3, color=color, label=passes)
        line = axis["lines"][passes]
        ends = [0, max(numbers)]
        axes.plot(ends, [line["start"] + line["slope"] * x for x in ends], color=color, lw=1, label=f"{passes}, line")
    axes.set_xlabel(axis["title"], fontsize=12)
    axes.set_xlim(left=0)
    axes.set_xticks(numbers if numbers[1] > max(numbers) / 8 else [numbers[0], *numbers[2:]])


def draw_processes(axes: Any, teams: dict[str, dict[str, dict[str, float]]]) -> None:
    for shift, (passes, color) in zip((-0.03, 0.03), COLORS.items(), strict=True):
        each = [teams[name][passes] for name in ("one process", "two processes")]
        times = [team["ratio"] for team in each]
        errors = [[t["ratio"] - t["from"] for t in each], [t["to"] - t["ratio"] for t in each]]
        axes.errorbar([1 + shift, 2 + shift], times, errors, fmt="o", ms=5, capsize=3, color=color)
        apart = teams["two trainers apart"][passes]["ratio"]
        axes.plot(2 + shift, apart, "x", markersize=8, color=color, label=f"{passes}, two trainers apart")
    axes.plot([1, 2], [1, 0.5], color="#6e7781", lw=1, ls="--", label="half the time")
    axes.set_xlabel("processes, one thread each", fontsize=12)
    axes.set_xticks([1, 2])
    axes.set_xlim(0.8, 2.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds per point")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "scaling.json")
    parser.add_argument("--shown", type=Path, help="show and draw an earlier output, without measuring")
    parser.add_argument("--points", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.points:
        return serve([Point(*sizes) for sizes in arguments.points], arguments.processes)
    if arguments.shown:
        results = json.loads(arguments.shown.read_text())
    else:
        results = {"machine": machine(), **summarize(*run_all(arguments.axes, arguments.repeats))}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    draw(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
