"""Training runs for tests/test_processes.py, in one process or several."""

import dataclasses
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.rollout.advantages import PromptStatistics
from ddpo_trl.update.target_kl import TargetKL


SAMPLES_PER_ROUND = 8
PROMPTS = ["cat", "dog", "owl"]


class FirstUpdate(TrainerCallback):
    """Keeps the gradient of the first optimizer step, as synchronised, and the advantages that led to it."""

    def __init__(self):
        self.trainer: DDPOTrainer
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            parameters = dict(model.named_parameters())
            self.gradients = {name: p.grad.clone() for name, p in parameters.items() if p.requires_grad}
            self.advantages = self.trainer.rollout.advantages


def make_config(output_dir: str, num_processes: int, **settings: Any) -> DDPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "log_images_rounds": 2,
        "num_logged_images": 3,
        "num_train_epochs": 2,
        "num_inference_steps": 3,
        "per_device_sample_batch_size": 2,
        "num_sample_batches": SAMPLES_PER_ROUND // 2 // num_processes,
        "per_device_train_batch_size": 2,
        "num_mini_batches": 1,
        "learning_rate": 1e-2,
    }
    config = DDPOConfig(**{**defaults, **settings})
    assert config.world_size == num_processes, "not started as asked"
    return config


def weights(trainer: DDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def plain_run(output_dir: str, num_processes: int, one_pass: bool) -> dict[str, Any]:
    """Two rounds with plain gradient descent, whose steps show the gradients as they are."""
    config = make_config(
        output_dir,
        num_processes,
        advantage_normalization="prompt",
        per_prompt_stat_tracking_min_count=2,
        max_grad_norm=0.0,
        optim="sgd",
        one_pass=one_pass,
    )
    recorder = FirstUpdate()
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), callbacks=[recorder], eval_prompts=PROMPTS)
    recorder.trainer = trainer
    trainer.train()
    samples = trainer.generate_samples()
    assert isinstance(trainer.advantages.normalize, PromptStatistics)
    return {
        "gradients": recorder.gradients,
        "advantages": recorder.advantages,
        "weights": weights(trainer),
        "statistics": trainer.advantages.normalize.state_dict(),
        "rewards": [log["reward"] for log in trainer.state.log_history if "reward" in log],
        "images": trainer.rollout.images,
        "evaluation": (samples.prompts, samples.images),
    }


def stopped_run(output_dir: str, num_processes: int) -> dict[str, Any]:
    """Two rounds whose updates `target_kl` ends."""
    config = make_config(output_dir, num_processes, save_strategy="no", num_ppo_epochs=3, target_kl=1e-30)
    prompts = [*PROMPTS, *PROMPTS[:2]]
    trainer = DDPOTrainer(
        config, brightness, PROMPTS, tiny_pipeline(), eval_prompts=prompts, eval_reward_fn=brightness
    )
    trainer.train()
    return {
        "weights": weights(trainer),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "skipped": [log["policy/updates_skipped"] for log in trainer.state.log_history if "reward" in log],
        "decisions": decisions(trainer) if num_processes == 2 else [],
        "metrics": trainer.evaluate(),  # five prompts on two processes
    }


def refusal(construct: Callable[[], Any]) -> str:
    try:
        construct()
    except ValueError as error:
        return str(error)
    return ""


def unequal_processes(output_dir: str) -> dict[str, Any]:
    """What both processes decide where the second one has no memory left, or was given something else."""
    process = PartialState().process_index
    config = make_config(output_dir, 2)

    def trainer(prompts: Any = PROMPTS, **settings: Any) -> DDPOTrainer:
        return DDPOTrainer(dataclasses.replace(config, **settings), brightness, prompts, tiny_pipeline())

    available = psutil.virtual_memory()._replace(available=10_000)
    with mock.patch("psutil.virtual_memory", lambda: available) if process else nullcontext():
        chosen = trainer()
        chosen.train()
        insisting = refusal(lambda: trainer(one_pass=True))

    def drawing() -> tuple[str, dict[str, Any]]:
        return f"{PROMPTS[process]} alone", {}

    return {
        "one_pass": chosen.plan.one_pass,
        "because": chosen.plan.one_pass_disabled_reason,
        "weights": weights(chosen),
        "insisting": insisting,
        "other settings": refusal(lambda: trainer(learning_rate=1e-2 * (1 + process))),
        "other prompts": refusal(lambda: trainer(PROMPTS[:: 1 - 2 * process])),
        "other checkpoints": refusal(lambda: chosen.train(resume_from_checkpoint=process == 0)),
        "example": trainer(drawing)._example[0],
    }


def dropped_run(output_dir: str, one_pass: bool, spoilt: bool) -> dict[str, Any]:
    """A round in which all samples of the second process are dropped: for their rewards, or for their latents."""
    config = make_config(
        output_dir, 2, num_train_epochs=1, on_invalid_reward="drop", one_pass=one_pass, log_images_rounds=0
    )
    pipeline, is_second = tiny_pipeline(), PartialState().process_index == 1
    spoil: list[bool] = []

    def reward(images: torch.Tensor, *args: Any) -> Any:
        return [None] * len(images) if spoil else brightness(images, *args)

    if spoilt:
        pipeline.unet.conv_in.register_forward_hook(lambda *args: args[-1] * torch.nan if spoil else None)
    trainer = DDPOTrainer(config, brightness if spoilt else reward, PROMPTS, pipeline)
    begin = trainer._start_updates

    def begin_sound(rollout: Any) -> None:
        spoil.clear()
        begin(rollout)

    trainer._start_updates = begin_sound  # type: ignore[method-assign]
    spoil.extend([True] * is_second)
    trainer.train()
    return {"weights": weights(trainer), "logs": [log for log in trainer.state.log_history if "reward" in log]}


class OnTheLastProcess(TrainerCallback):
    """Asks for something inside the second round, or sends a signal, on one process only."""

    def __init__(self, event: str, request: str):
        self.asked = False

        def answer(args, state, control, **kwargs):
            if args.process_index < args.world_size - 1 or state.global_step < 2 or self.asked:
                return
            self.asked = True
            if request == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                setattr(control, request, True)

        setattr(self, event, answer)


def asked_runs(output_dir: str, num_processes: int) -> dict[str, Any]:
    """Three rounds of two updates, in which one process asks for something: how they end, by the event."""
    ends = {}
    for event, request in (
        ("on_substep_end", "should_training_stop"), ("on_step_begin", "signal"), ("on_log", "should_training_stop"),
        ("on_evaluate", "should_save"), ("on_epoch_end", "should_evaluate"), ("on_log", "should_save"),
        ("on_log", "should_evaluate"),
    ):  # fmt: skip
        folder = f"{output_dir}/{event} {request}"
        config = make_config(
            folder, num_processes, num_mini_batches=2, num_train_epochs=3, save_rounds=3, eval_strategy="epoch",
            eval_rounds=2, log_images_rounds=0, num_inference_steps=2, num_sample_batches=1,
            per_device_train_batch_size=1,
        )  # fmt: skip
        callback = OnTheLastProcess(event, request)
        trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), callbacks=[callback], eval_prompts=["cat"])
        trainer.train()
        ends[f"{event} {request}"] = {
            "steps": trainer.state.global_step,
            "evaluated": [log["epoch"] for log in trainer.state.log_history if "eval_reward" in log],
            "checkpoints": sorted(path.name for path in Path(folder).glob("checkpoint-*")),
        }
    return ends


def decisions(trainer: DDPOTrainer) -> list[bool]:
    """Whether 1 on the first process and 3 on the second end the updates, for targets on both sides of their mean."""
    reached = []
    for target in (1.9, 2.1):
        limit = TargetKL(target)
        limit.add(torch.tensor(1.0 + 2 * trainer.args.process_index))
        limit.end_update(trainer.accelerator)
        reached.append(limit.reached)
    return reached


def main(output_dir: str, only_plain: bool = False) -> None:
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    results = {"plain": plain_run(f"{output_dir}/plain", num_processes, one_pass=False)}
    if not only_plain:
        results["stopped"] = stopped_run(f"{output_dir}/stopped", num_processes)
    if num_processes == 2:
        results["one_pass"] = plain_run(f"{output_dir}/one_pass", num_processes, one_pass=True)
        results["asked"] = asked_runs(f"{output_dir}/asked", num_processes)
        results["unequal"] = unequal_processes(f"{output_dir}/unequal")
        results["dropped"] = {
            f"{one_pass=}": [
                dropped_run(f"{output_dir}/dropped-{one_pass}-{spoilt}", one_pass, spoilt) for spoilt in (False, True)
            ]
            for one_pass in (True, False)
        }
    rank = torch.distributed.get_rank() if num_processes > 1 else 0
    torch.save(results, f"{output_dir}/rank-{rank}.pt")
    PartialState().destroy_process_group()  # or its threads may be cut off when the process exits
