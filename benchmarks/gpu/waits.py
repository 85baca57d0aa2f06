"""
Waits of the host for the GPU per round, by the place in the code that causes them; and rewards in their own stream.

PyTorch warns of each operation that waits (`torch.cuda.set_sync_debug_mode`). A rehearsal emulates that for reads of
single numbers. Rewards that a network computes on the GPU while the next batch is sampled must be bitwise those that
are computed while nothing else runs, whatever the order.
"""

import collections
import contextlib
import io
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import ddpo_trl
from ddpo_trl import DDPOTrainer, load_emoji_pipeline
from ddpo_trl.transfers import to_device
from gpu.setting import is_rehearsal, synchronize, table
from rounds import PROMPTS, quiet_config
from sides import brightness


OURS = str(Path(ddpo_trl.__file__).parent)
SYNCHRONIZES = "called a synchronizing CUDA operation"  # in PyTorch's warning


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    figures: dict[str, Any] = {"waits": {}}
    for one_pass in (True, False):
        figures["waits"]["one pass" if one_pass else "two passes"] = waits_of_a_round(device, one_pass)
    figures["rewards"] = rewards_in_their_stream(device)
    figures["copies"] = copies(device)
    return figures


def make_trainer(device: str, reward: Any, callbacks: list[TrainerCallback], **settings: Any) -> DDPOTrainer:
    """Make a trainer of the embedded pipeline for two rounds."""
    size = 2 if is_rehearsal(device) else 16
    config = quiet_config(
        use_cpu=device == "cpu",
        num_train_epochs=2,
        num_inference_steps=3 if is_rehearsal(device) else 10,
        per_device_sample_batch_size=size,
        per_device_train_batch_size=size,
        num_sample_batches=2 if is_rehearsal(device) else 4,
        **settings,
    )
    return DDPOTrainer(config, reward, PROMPTS, load_emoji_pipeline(), callbacks=callbacks)


def train(trainer: DDPOTrainer) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainer.train()


# ---- Waits ----


def waits_of_a_round(device: str, one_pass: bool) -> dict[str, int]:
    """Count the waits of the second round, by place."""
    found: collections.Counter[str] = collections.Counter()

    class SecondRound(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                self.context = contextlib.ExitStack()
                self.context.enter_context(counted_waits(device, found))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.context.close()

    train(make_trainer(device, brightness, [SecondRound()], one_pass=one_pass))
    return dict(found.most_common())


@contextlib.contextmanager
def counted_waits(device: str, found: "collections.Counter[str]") -> Iterator[None]:
    def count(message: Any, *args: Any, **kwargs: Any) -> None:
        if SYNCHRONIZES in str(message):
            found[place()] += 1

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        warnings.showwarning = count
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            stack.enter_context(ReadsWarn())
        yield


class ReadsWarn(TorchDispatchMode):
    """Warns, as PyTorch does of waits, when a single number is read from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            warnings.warn(SYNCHRONIZES, stacklevel=2)
        return func(*args, **(kwargs or {}))


def place() -> str:
    """Return the innermost line of the package on the stack, and the innermost of all, without PyTorch's internals."""
    hidden = (__file__, warnings.__file__, f"{Path(torch.__file__).parent}/_")
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(hidden)]
    ours = [frame for frame in frames if frame.filename.startswith(OURS)]
    shown = [f"ddpo_trl{ours[-1].filename.removeprefix(OURS)}:{ours[-1].lineno}"] if ours else []
    if not ours or frames[-1] is not ours[-1]:
        shown.append(f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno}")
    return " → ".join(shown)


# ---- Rewards ----


class Judge(nn.Module):
    """A reward of some milliseconds on the GPU: a random network that looks at the images many times."""

    def __init__(self, device: str, waits: bool):
        super().__init__()
        torch.manual_seed(0)
        self.device, self.waits = device, waits
        self.layers = nn.Sequential(nn.Conv2d(3, 64, 3), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=2)).to(device)
        self.seen: list[Tensor] = []
        self.rewards: list[Tensor] = []

    @torch.no_grad()
    def look(self, images: Tensor) -> Tensor:
        values = images.to(self.device)
        for _ in range(2 if is_rehearsal(self.device) else 50):
            values = self.layers(values)
            values = values / values.square().mean().sqrt()
        return values.flatten(1).mean(1)

    def __call__(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        if self.waits:
            synchronize(self.device)
        rewards = self.look(images)
        self.seen.append(images.clone())
        self.rewards.append(rewards.clone())
        return rewards


def rewards_in_their_stream(device: str) -> dict[str, Any]:
    """
    Train with rewards computed next to sampling, and with rewards that first wait for all other work; compare both
    with the rewards of the same images afterwards.
    """
    runs = {}
    for waits in (False, True):
        judge = Judge(device, waits)
        trainer = make_trainer(device, judge, [], one_pass=False, max_workers=1, num_mini_batches=1)
        train(trainer)
        synchronize(device)
        again = [judge.look(images) for images in judge.seen]
        log = next(log for log in trainer.state.log_history if "reward" in log)
        runs[waits] = {
            "rewards": torch.cat(judge.rewards).cpu(),
            "again": torch.cat(again).cpu(),
            "images": torch.cat(judge.seen).cpu(),
            "scoring": log["time/scoring"],
            "waiting": log["time/waiting_for_rewards"],
        }
    plain, waited = runs[False], runs[True]
    return {
        "recomputed": difference(plain["rewards"], plain["again"]),
        "recomputed, with waits": difference(waited["rewards"], waited["again"]),
        "with and without waits": difference(plain["rewards"], waited["rewards"]),
        "images with and without waits": difference(plain["images"], waited["images"]),
        "seconds of scoring": plain["scoring"],
        "seconds waited for it": plain["waiting"],
    }


def difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


# ---- Copies ----


def copies(device: str) -> dict[str, float]:
    """Measure how many milliseconds the host waits for a copy to the device while that is busy."""
    noise = torch.randn(10, 4, 64, 64)
    work = torch.randn(256 if is_rehearsal(device) else 8192, 256 if is_rehearsal(device) else 8192, device=device)
    ways = {"pageable memory": lambda: noise.to(device), "to_device": lambda: to_device(noise, torch.device(device))}
    found = {}
    for name, copy in ways.items():
        copy()
        synchronize(device)
        for _ in range(5):
            work @ work
        start = time.perf_counter()
        copied = copy()
        found[name] = 1e3 * (time.perf_counter() - start)
        assert torch.equal(copied.cpu(), noise)
    return found


# ---- Results ----


def line(figures: dict[str, Any]) -> str:
    waits = [f"{name} {sum(places.values())} waits" for name, places in figures["waits"].items()]
    rewards, copied = figures["rewards"], figures["copies"]
    exact = max(rewards["recomputed"], rewards["with and without waits"]) == 0
    same = "bitwise equal" if exact else "NOT EQUAL"
    return (
        f"{', '.join(waits)} per round; rewards in their stream {same}; a copy to the busy device takes "
        f"{copied['pageable memory']:.2f} ms from pageable memory, {copied['to_device']:.2f} ms as made here"
    )


def page(figures: dict[str, Any]) -> str:
    places = [
        [passes, count, f"`{where}`"] for passes, found in figures["waits"].items() for where, count in found.items()
    ]
    rewards = [[name, f"{value:.3g}"] for name, value in figures["rewards"].items()]
    copied = [[name, f"{value:.3f}"] for name, value in figures["copies"].items()]
    return (
        "Waits in the second round of the embedded pipeline, 4 batches of 16 images with 10 steps, by the innermost "
        f"line of this package and of all:\n\n{table(['', 'waits', 'place'], places)}\n"
        "Rewards of a network on the GPU, computed while the next batch is sampled; differences are the largest ones, "
        f"0 is bitwise:\n\n{table(['', ''], rewards)}\n"
        "Milliseconds that the host waits for a copy of a trajectory's noise while the GPU is busy:\n\n"
        f"{table(['', ''], copied)}"
    )
