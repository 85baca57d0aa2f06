"""
Rounds of ours and of TRL 0.23.1's DDPOTrainer side by side, and the floor under both: `make bench`.

Each side has a process of its own and waits for its turn: rounds are interleaved, so that what else the machine does
hits all alike, and ratios are those of neighbouring rounds. All train a LoRA adapter of rank 4 on the same pipeline:
the same number of images, denoising steps and samples a micro-batch, guidance in sampling and training, one update a
round, float32, the same torch and threads. TRL 0.23.1, the last with this trainer, gets a virtual environment of its
own, with the transformers 4 and diffusers of its time. The floor is the denoiser alone: as many bare forward passes as
sampling takes, as many forward and backward passes as training takes. Before that, both take the gradient of the same
trajectories. Writes outputs/bench.json; a dated copy stands in benchmarks/.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rounds import GUIDANCE, PROMPTS, ROOT, Child, machine, quiet_config, resident_bytes


EMOJI = ROOT / "src" / "ddpo_trl" / "assets" / "emoji"  # TRL's environment has no ddpo_trl to ask
TRL_ENVIRONMENT = ROOT / "build" / "trl-0.23.1"
TRL_PYTHON = TRL_ENVIRONMENT / "bin" / "python"
TRL_PACKAGES = ["trl==0.23.1", "transformers<5", "diffusers", "peft"]
LEARNING_RATE = 1e-4
SESSIONS = 2  # times that the processes of all sides are started


class Case(NamedTuple):
    """A pipeline and the size of a round on it."""

    title: str
    batch_size: int
    batches: int
    steps: int


CASES = {
    "emoji": Case("embedded pipeline, 16x16 latents", batch_size=16, batches=2, steps=10),
    "random": Case("random Stable Diffusion of 12 M parameters, 32x32 latents", batch_size=4, batches=2, steps=5),
}


# ---- The pipelines ----


def pipeline_folder(case: str) -> Path:
    """Where the pipeline is, saved anew: transformers 5 names weights as 4 does, and the embedded files don't."""
    folder = ROOT / "build" / "bench" / case
    if not folder.is_dir():
        pipeline = random_stable_diffusion() if case == "random" else load_from(EMOJI)
        pipeline.save_pretrained(folder)
    return folder


def random_stable_diffusion() -> Any:
    """Of Stable Diffusion 1.5's shape, narrower; tokenizer and text encoder are the embedded pipeline's."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    parts = load_from(EMOJI)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 96, 136, 136),
        layers_per_block=2,
        cross_attention_dim=parts.text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),  # fmt: skip
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load(case: str) -> Any:
    pipeline = load_from(pipeline_folder(case))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_from(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder)


def brightness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> tuple[Tensor, dict[str, Any]]:
    """In the signature of TRL 0.23.1, which ddpo_trl takes too."""
    return images.flatten(1).mean(1), {}


# ---- What runs in a process of its own: a round whenever it is told to ----


def our_trainer(case: str, sizes: Case, rounds: int, callbacks: Sequence[Any] = (), **options: Any) -> Any:
    from ddpo_trl import DDPOTrainer

    config = quiet_config(
        use_cpu=True,
        num_train_epochs=rounds,
        num_inference_steps=sizes.steps,
        learning_rate=LEARNING_RATE,
        per_device_sample_batch_size=sizes.batch_size,
        num_sample_batches=sizes.batches,
        per_device_train_batch_size=sizes.batch_size,
        **options,
    )
    return DDPOTrainer(config, brightness, PROMPTS, load(case), callbacks=list(callbacks))


def run_ours(case: str, one_pass: bool, rounds: int, turn: Callable[[dict[str, float] | None], None]) -> None:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turn(None)
            self.start = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            total = time.perf_counter() - self.start
            metrics = trainer.rollout.metrics
            sampling = metrics["time/sampling"] + metrics["time/waiting_for_rewards"]
            turn({"sampling": sampling, "training": total - sampling, "round": total})

    trainer = our_trainer(case, CASES[case], rounds, [Turns()], one_pass=one_pass)
    turn({"resident": resident_bytes()})
    trainer.train()


def their_trainer(case: str, sizes: Case, learning_rate: float = LEARNING_RATE, max_grad_norm: float = 1.0) -> Any:
    from accelerate import PartialState

    PartialState(cpu=True)  # TRL 0.23.1's pipeline can't be made without
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config = DDPOConfig(
        num_epochs=1,
        sample_num_steps=sizes.steps,
        sample_guidance_scale=GUIDANCE,
        train_learning_rate=learning_rate,
        train_max_grad_norm=max_grad_norm,
        sample_batch_size=sizes.batch_size,
        sample_num_batches_per_epoch=sizes.batches,
        train_batch_size=sizes.batch_size,
        train_gradient_accumulation_steps=sizes.batches,
        mixed_precision="no",
        allow_tf32=False,
        save_freq=10**6,
        accelerator_kwargs={"cpu": True},
    )
    numbers = iter(range(10**9))
    pipeline = DefaultDDPOStableDiffusionPipeline(str(pipeline_folder(case)), use_lora=True)
    trainer = DDPOTrainer(config, brightness, lambda: (PROMPTS[next(numbers) % len(PROMPTS)], {}), pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    return trainer


def run_theirs(case: str, rounds: int, turn: Callable[[dict[str, float] | None], None]) -> None:
    trainer = their_trainer(case, CASES[case])
    generate, seconds = trainer._generate_samples, {}

    def timed(**sizes: int) -> Any:
        start = time.perf_counter()
        samples = generate(**sizes)
        seconds["sampling"] = time.perf_counter() - start
        return samples

    trainer._generate_samples = timed
    turn({"resident": resident_bytes()})
    for round in range(rounds):
        turn(None)
        start = time.perf_counter()
        trainer.step(round, round)
        total = time.perf_counter() - start
        turn({"sampling": seconds["sampling"], "training": total - seconds["sampling"], "round": total})


def run_floor(case: str, rounds: int, turn: Callable[[dict[str, float] | None], None]) -> None:
    """The denoiser with its adapter alone, on batches doubled by guidance."""
    from ddpo_trl.lora import put_on_adapter

    pipeline, sizes = load(case), CASES[case]
    put_on_adapter(pipeline, None)
    with torch.no_grad():
        prompts = [PROMPTS[0]] * sizes.batch_size
        embeds = torch.cat(pipeline.encode_prompt(prompts, "cpu", 1, True)[::-1])
    config = pipeline.unet.config
    latents = torch.randn(2 * sizes.batch_size, config.in_channels, config.sample_size, config.sample_size)
    calls = sizes.batches * sizes.steps
    turn({"resident": resident_bytes()})
    for _ in range(rounds):
        turn(None)
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(calls):
                pipeline.unet(latents, 500, embeds)
        sampled = time.perf_counter()
        for _ in range(calls):
            pipeline.unet(latents, 500, embeds).sample.square().mean().backward()
        end = time.perf_counter()
        turn({"sampling": sampled - start, "training": end - sampled, "round": end - start})


RUNS: dict[str, Callable[[str, int, Callable[[dict[str, float] | None], None]], None]] = {
    "TRL 0.23.1": run_theirs,
    "two passes": lambda case, rounds, turn: run_ours(case, False, rounds, turn),
    "one pass": lambda case, rounds, turn: run_ours(case, True, rounds, turn),
    "floor": run_floor,
}


def python_of(run: str) -> str:
    """The interpreter of a side's environment."""
    return str(TRL_PYTHON) if run == "TRL 0.23.1" else sys.executable


def command(case: str, run: str, rounds: int) -> list[str]:
    """Of a child, which serves the rounds of one side."""
    return [python_of(run), __file__, "--case", case, "--run", run, "--rounds", str(rounds)]


def serve_rounds(case: str, run: str, rounds: int) -> None:
    """Runs in a child: a round for each line on the standard input, an answer for each on the standard output."""
    answers = sys.stdout
    before = 0

    def turn(answer: dict[str, float] | None) -> None:
        nonlocal before
        if answer is None:
            sys.stdin.readline()
            return
        before = before or int(answer.get("resident", 0))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**answer, "MiB": (peak - before) / 2**20}), file=answers, flush=True)

    with contextlib.redirect_stdout(io.StringIO()):
        RUNS[run](case, rounds, turn)


# ---- The gradient of the same trajectories ----


class TheirRound(NamedTuple):
    """What TRL's trainer sampled, with which weights, and the gradient it took of that."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    timesteps: list[int]
    samples: list[dict[str, Tensor]]


def their_round(case: str) -> TheirRound:
    torch.manual_seed(0)
    trainer = their_trainer(case, CASES[case], learning_rate=0.0, max_grad_norm=1e9)
    trainer.prompt_fn = lambda: (PROMPTS[0], {})  # samples are shuffled before training
    weights = {name: p for name, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    train, step = trainer._train_batched_samples, trainer.optimizer.optimizer.step
    batches: list[dict[str, Tensor]] = []
    gradients: dict[str, Tensor] = {}

    def keep_samples(inner_epoch: int, epoch: int, global_step: int, samples: list[dict[str, Tensor]]) -> int:
        batches.extend(samples)
        return train(inner_epoch, epoch, global_step, samples)

    def keep_gradient(*args: Any, **kwargs: Any) -> Any:
        gradients.update({name: p.grad.clone() for name, p in weights.items() if p.grad is not None})
        return step(*args, **kwargs)

    trainer._train_batched_samples = keep_samples
    trainer.optimizer.optimizer.step = keep_gradient
    trainer.step(0, 0)
    detached = {name: weight.detach() for name, weight in weights.items()}
    return TheirRound(detached, gradients, trainer.sd_pipeline.scheduler.timesteps.tolist(), batches)


def gradient_difference(case: str) -> float:
    """Relative L2 distance of TRL's gradient from ours, on TRL's trajectories and with its weights."""
    kept = pipeline_folder(case).with_suffix(".pt")
    subprocess.run([str(TRL_PYTHON), __file__, "--case", case, "--keep_round", str(kept)], check=True)
    theirs = TheirRound(**torch.load(kept, weights_only=True))
    with contextlib.redirect_stdout(io.StringIO()):
        ours = our_trainer(case, CASES[case], rounds=1, one_pass=False)
    parameters = dict(ours.pipeline.unet.named_parameters())
    with torch.no_grad():
        for name, weight in theirs.weights.items():
            parameters[name].copy_(weight)
    sizes = CASES[case]
    rows = torch.arange(sizes.batch_size)
    context = ours.model.context([PROMPTS[0]] * len(rows), [{}] * len(rows), [0] * len(rows))
    for samples in theirs.samples:
        for index, timestep in enumerate(theirs.timesteps):
            place = (samples["timesteps"] == timestep).int().argmax(1)
            latents, next_latents = (samples[name][rows, place] for name in ("latents", "next_latents"))
            log_probs, _ = ours.model(index, latents, next_latents, context)
            loss = -(samples["advantages"].clamp(-10, 10) * log_probs).mean()  # TRL's default bound
            (loss / (sizes.batches * sizes.steps)).backward()
    difference = sum(((parameters[name].grad - grad) ** 2).sum().item() for name, grad in theirs.gradients.items())
    size = sum((grad**2).sum().item() for grad in theirs.gradients.values())
    return (difference / size) ** 0.5


# ---- The table ----


def fetch_trl() -> None:
    """Makes TRL's environment, with the torch that we run on."""
    done = TRL_ENVIRONMENT / "ready"
    if done.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(TRL_ENVIRONMENT)], check=True)
    torch_version = importlib.metadata.version("torch").split("+")[0]  # alone: only so is its CPU build taken
    for packages in ([f"torch=={torch_version}"], TRL_PACKAGES):
        subprocess.run([str(TRL_PYTHON), "-m", "pip", "install", "-q", *packages], check=True)
    done.touch()


def measure(case: str, repeats: int) -> dict[str, dict[str, list[float]]]:
    """
    Figures of all rounds, by side and name.

    Args:
        case (`str`):
            A key of `CASES`.
        repeats (`int`):
            Rounds of each process that count. Processes are started more than once, as some are slower than others.
    """
    figures: dict[str, dict[str, list[float]]] = {run: {} for run in RUNS}
    for session in range(SESSIONS):
        children = {run: Child(command(case, run, repeats + 1)) for run in RUNS}
        for child in children.values():
            child.answer()  # it is ready
        for repeat in range(repeats + 1):
            turns = list(children.items())
            for run, child in turns if (session + repeat) % 2 else reversed(turns):
                child.ask()
                answer = child.answer()
                for name, value in answer.items() if repeat else ():  # the first is warm-up
                    figures[run].setdefault(name, []).append(value)
        for child in children.values():
            child.end()
    return figures


def ratios(figures: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Each ratio once for each repeat, of rounds that ran one after the other; those of memory once."""
    rounds = {run: values["round"] for run, values in figures.items()}
    peaks = {run: max(values["MiB"]) for run, values in figures.items()}

    def of(one: list[float], other: list[float]) -> list[float]:
        return [value / base for value, base in zip(one, other, strict=True)]

    return {
        "round_speedup_vs_trl": of(rounds["TRL 0.23.1"], rounds["two passes"]),
        "one_pass_speedup": of(rounds["two passes"], rounds["one pass"]),
        "one_pass_speedup_vs_trl": of(rounds["TRL 0.23.1"], rounds["one pass"]),
        "overhead_over_floor": of(rounds["two passes"], rounds["floor"]),
        # One pass needs one forward and one backward pass a step: what training alone takes.
        "one_pass_overhead_over_floor": of(rounds["one pass"], figures["floor"]["training"]),
        "memory_vs_trl": [peaks["two passes"] / peaks["TRL 0.23.1"]],
        "one_pass_memory_vs_trl": [peaks["one pass"] / peaks["TRL 0.23.1"]],
    }


def show(case: str, figures: dict[str, dict[str, list[float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    sizes = CASES[case]
    samples = sizes.batch_size * sizes.batches
    base = figures["TRL 0.23.1"]["round"]
    table = Table(title=f"{sizes.title}: {sizes.batches} batches of {sizes.batch_size}, {sizes.steps} steps")
    headings = ["", "sampling", "training", "round, samples/s", "spread", "round, TRL = 1", "peak MiB"]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for run, values in figures.items():
        rates = {what: samples / statistics.median(values[what]) for what in ("sampling", "training", "round")}
        spread = f"{samples / max(values['round']):.2f}..{samples / min(values['round']):.2f}"
        relative = statistics.median(own / theirs for own, theirs in zip(values["round"], base, strict=True))
        training = "-" if run == "one pass" else f"{rates['training']:.2f}"
        table.add_row(
            run, f"{rates['sampling']:.2f}", training, f"{rates['round']:.2f}", spread,
            f"{relative:.2f}", f"{max(values['MiB']):.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


def trl_environment() -> str:
    """What its pip says is there, of what matters."""
    freeze = [str(TRL_PYTHON), "-m", "pip", "freeze"]
    listed = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    return " ".join(line for line in listed if line.split("==")[0] in ("torch", "transformers", "diffusers", "peft"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=2, help="rounds of each process that count")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "bench.json")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--keep_round", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        torch.manual_seed(0)
        return serve_rounds(arguments.case, arguments.run, arguments.rounds)
    if arguments.keep_round:
        with contextlib.redirect_stdout(io.StringIO()):
            return torch.save(their_round(arguments.case)._asdict(), arguments.keep_round)
    if arguments.gradient:
        return print(gradient_difference(arguments.gradient))
    fetch_trl()
    results: dict[str, Any] = {"machine": {**machine(), "TRL's environment": trl_environment()}, "cases": {}}
    for case in arguments.cases:
        results["cases"][case] = run_case(case, arguments.repeats)
    first = results["cases"][arguments.cases[0]]
    results = {**{name: value for name, value in first.items() if isinstance(value, float)}, **results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def run_case(case: str, repeats: int) -> dict[str, Any]:
    """Measures a case, shows it, and returns what is kept of it."""
    pipeline_folder(case)  # made here: TRL's environment could not
    child = subprocess.run([sys.executable, __file__, "--gradient", case], capture_output=True, text=True, check=True)
    figures = measure(case, repeats)
    show(case, figures)
    medians = {"gradient_difference": float(child.stdout.split()[-1])}
    spreads = {}
    print(f"TRL's gradient on the same trajectories differs by {medians['gradient_difference']:.1e} of its size")
    for name, values in ratios(figures).items():
        medians[name], spreads[name] = statistics.median(values), [min(values), max(values)]
        print(f"{name:<30} {medians[name]:.3f}  ({min(values):.3f} to {max(values):.3f})")
    return {**medians, "from_to": spreads, "size": CASES[case]._asdict(), "figures": figures}


if __name__ == "__main__":
    main()
