"""One side of a comparison of rounds: it makes its pipeline and trainer, and then a round for each question."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from ddpo_trl import DDPOTrainer
from ddpo_trl.policy.lora import add_adapter
from gpu.networks import NETWORKS, Network
from gpu.setting import is_rehearsal, synchronize
from gpu.trl_loop import TRLLoop
from rounds import GUIDANCE, LEARNING_RATE, PROMPTS, quiet_config
from sides import brightness


def forecast_bytes(trainer: DDPOTrainer) -> int | None:
    """Return the peak memory that a plan forecasts, `None` without a forecast, as on a CPU."""
    return max(trainer.plan.forecast_peaks.values(), default=None)


class Turns:
    """
    Connection of a side to the one who asks.

    Args:
        device (`str`):
            The device.
        questions (`Iterator`), answer (`Callable`):
            Of a [`~gpu.workers.Worker`].
    """

    def __init__(self, device: str, questions: Iterator[Any], answer: Callable[[dict[str, Any]], None]):
        self.device, self.questions, self.answer = device, questions, answer
        self.denoised = 0

    def ready(self, denoiser: torch.nn.Module) -> None:
        """Count denoised samples from now on, and say that the side is ready."""

        def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self.denoised += len(inputs[0])

        denoiser.register_forward_pre_hook(count)
        self.answer({})

    def begin(self) -> None:
        """Give unused memory to the other sides, wait for a question, and start the clock."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
        next(self.questions)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.denoised = 0
        synchronize(self.device)
        self.start = time.perf_counter()

    def end(self, **more: Any) -> None:
        """Stop the clock, and answer."""
        synchronize(self.device)
        answer = {"seconds": time.perf_counter() - self.start, "denoised": self.denoised, **more}
        if self.device == "cuda":
            answer["peak_bytes"] = torch.cuda.max_memory_allocated()
        self.answer(answer)


def floor(network: Network, turns: Turns, rounds: int) -> None:
    """Run the denoiser alone, with the inputs that its pipeline gives it: what any trainer has to do."""
    pipeline = network.pipeline(turns.device)
    add_adapter(pipeline, None)
    inputs = inputs_of_denoiser(pipeline, network)
    trained = TRLLoop(pipeline, network, LEARNING_RATE).trained_steps
    turns.ready(pipeline.unet)
    for _ in range(rounds):
        turns.begin()
        with torch.no_grad():
            for _ in range(network.steps):
                pipeline.unet(*inputs[0], **inputs[1])
        for _ in range(trained):
            pipeline.unet(*inputs[0], **inputs[1])[0].float().square().mean().backward()
        turns.end()


def inputs_of_denoiser(pipeline: Any, network: Network) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    pipeline(prompts_of(network), num_inference_steps=1, guidance_scale=GUIDANCE, output_type="latent")
    hook.remove()
    return found[0]


def prompts_of(network: Network) -> list[str]:
    return (PROMPTS * network.batch_size)[: network.batch_size]


def trl(network: Network, turns: Turns, rounds: int) -> None:
    pipeline = network.pipeline(turns.device)
    add_adapter(pipeline, None)
    loop = TRLLoop(pipeline, network, LEARNING_RATE)
    turns.ready(pipeline.unet)
    for _ in range(rounds):
        turns.begin()
        loop.a_round(prompts_of(network))
        turns.end()


def ours(network: Network, turns: Turns, rounds: int, one_pass: bool, **options: Any) -> None:
    """Run rounds of DDPOTrainer."""

    class Rounds(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            turns.end(one_pass=trainer.plan.one_pass, forecast_bytes=forecast_bytes(trainer))

    config = quiet_config(
        use_cpu=turns.device == "cpu",
        num_train_epochs=rounds,
        num_inference_steps=network.steps,
        per_device_sample_batch_size=network.batch_size,
        num_sample_batches=1,
        per_device_train_batch_size=network.batch_size,
        learning_rate=LEARNING_RATE,
        one_pass=one_pass,
        **options,
    )
    pipeline = network.pipeline(turns.device)
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline, callbacks=[Rounds()])
    turns.ready(pipeline.unet)
    trainer.train()


def compiled(network: Network, turns: Turns, rounds: int) -> None:
    """Run rounds in two passes with a compiled denoiser. A rehearsal only traces it, which takes less time."""
    torch._dynamo.config.recompile_limit = 64  # blocks have many shapes, with gradients and without
    backend = "eager" if is_rehearsal(turns.device) else "inductor"
    ours(network, turns, rounds, one_pass=False, torch_compile=True, torch_compile_backend=backend)


SIDES: dict[str, Callable[[Network, Turns, int], None]] = {
    "floor": floor,
    "TRL's loop": trl,
    "two passes": functools.partial(ours, one_pass=False),
    "one pass": functools.partial(ours, one_pass=True),
    "two passes, checkpointing": functools.partial(ours, one_pass=False, gradient_checkpointing=True),
    "one pass, checkpointing": functools.partial(ours, one_pass=True, gradient_checkpointing=True),
    "two passes, compiled": compiled,
}


def run_side(
    questions: Iterator[Any],
    answer: Callable[[dict[str, Any]], None],
    network: str,
    side: str,
    device: str,
    rounds: int,
) -> None:
    """Answer when the side is ready, and then with the seconds and the peak memory of each round."""
    SIDES[side](NETWORKS[network].sized(device), Turns(device, questions, answer), rounds)
