"""Training runs with a failing reward on one of two ranks, for tests/rewards/test_misbehaving_rewards.py."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer


SIZE = 4  # of a batch; the trial at construction has two images


def trainer_of(output_dir: str, reward: Callable[[int, int, list[float]], Any], **settings: Any) -> DDPOTrainer:
    """Two ranks, one batch of four images on each; `reward` turns rank, round and right rewards into an answer."""
    calls = 0

    def reward_fn(images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        nonlocal calls
        rewards = brightness(images, prompts, metadata).tolist()
        if len(images) == 1:
            time.sleep(600)
        if len(images) < SIZE:
            return rewards
        calls += 1
        return reward(config.process_index, calls - 1, rewards)

    config = DDPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        log_images_rounds=0,
        num_train_epochs=2,
        num_inference_steps=3,
        per_device_sample_batch_size=SIZE,
        num_sample_batches=1,
        per_device_train_batch_size=SIZE,
        advantage_normalization="prompt",
        per_prompt_stat_tracking_min_count=2,
        learning_rate=1e-2,
        **settings,
    )
    return DDPOTrainer(config, reward_fn, ["cat", "dog", "owl"], tiny_pipeline())


def rank_one_raises(rank: int, round: int, rewards: list[float]) -> Any:
    if rank == 1 and round == 1:
        raise ConnectionError("rank 1 fails")
    return rewards


def slow_or_dropping(rank: int, round: int, rewards: list[float]) -> Any:
    if rank == 0:
        time.sleep(1.0)
        return rewards
    return [*rewards[:3], None]


def too_many(rank: int, round: int, rewards: list[float]) -> Any:
    if rank == 1:
        raise ConnectionError("rank 1 has none")
    return [*rewards[:3], None]


def with_a_nan_image_on_rank_one(output_dir: str, on_invalid_reward: str) -> tuple[DDPOTrainer, str]:
    """A run whose autoencoder overflows once on rank 1, and the error that ended it."""
    trainer = trainer_of(
        output_dir, lambda rank, round, rewards: rewards, on_invalid_reward=on_invalid_reward, save_strategy="no"
    )
    vae = trainer.pipeline.vae
    decode, calls = vae.decode, []

    def overflowing(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = decode(latents, *args, **kwargs)
        calls.append(1)
        if trainer.args.process_index == 1 and len(calls) == 1:
            (output[0] if isinstance(output, tuple) else output.sample)[2] = float("nan")
        return output

    vae.decode = overflowing
    try:
        trainer.train()
    except RuntimeError as error:
        return trainer, str(error)
    return trainer, ""


def weights(trainer: DDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def main(output_dir: str, scenario: str) -> None:
    if scenario == "raise":
        trainer = trainer_of(output_dir, rank_one_raises)
        if trainer.args.process_index == 0:
            trainer.scorer.submit(torch.zeros(1, 3, 16, 16), ["cat"], [{}], "hangs beside the run")
        try:
            trainer.train()
        except RuntimeError as error:
            raised = {"message": str(error), "time": time.time()}
            torch.save(raised, f"{output_dir}/raised-{trainer.args.process_index}.pt")
            raise
    else:
        trainer = trainer_of(output_dir, slow_or_dropping, on_invalid_reward="drop", save_strategy="no")
        trainer.train()
        logs = [log for log in trainer.state.log_history if "reward" in log]
        failing = trainer_of(output_dir, too_many, on_invalid_reward="drop", save_strategy="no")
        message = ""
        try:
            failing.train()
        except RuntimeError as error:
            message = str(error)
        overflowed, _ = with_a_nan_image_on_rank_one(output_dir, "drop")
        _, raised_by_nan = with_a_nan_image_on_rank_one(output_dir, "raise")
        torch.save(
            {
                "weights": weights(trainer),
                "weights_after_nan": weights(overflowed),
                "raised_by_nan": raised_by_nan,
                "invalid": [log["rewards/invalid"] for log in logs],
                "reward": [log["reward"] for log in logs],
                "rewards": trainer.rollout.rewards,
                "too_many": message,
            },
            f"{output_dir}/rank-{trainer.args.process_index}.pt",
        )
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
