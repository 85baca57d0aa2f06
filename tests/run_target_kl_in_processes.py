"""Two rounds whose updates `target_kl` ends, for tests/test_processes.py, started by `torchrun`."""

import sys

import torch

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.target_kl import TargetKL


def decisions(trainer: DDPOTrainer) -> list[bool]:
    """Whether 1 on the first process and 3 on the second end the updates, for targets on both sides of their mean."""
    reached = []
    for target in (1.9, 2.1):
        limit = TargetKL(target)
        limit.add(torch.tensor(1.0 + 2 * trainer.args.process_index))
        limit.end_update(trainer.accelerator)
        reached.append(limit.reached)
    return reached


def main(output_dir: str, num_processes: int) -> None:
    config = DDPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        num_train_epochs=2,
        num_inference_steps=3,
        per_device_sample_batch_size=2,
        num_sample_batches=8 // 2 // num_processes,
        per_device_train_batch_size=2,
        num_ppo_epochs=3,
        target_kl=1e-30,
        learning_rate=1e-2,
    )
    prompts = ["cat", "dog", "owl"]
    trainer = DDPOTrainer(
        config, brightness, prompts, tiny_pipeline(), eval_prompts=[*prompts, *prompts[:2]], eval_reward_fns=brightness
    )
    assert config.world_size == num_processes, "not started as asked"
    trainer.train()
    torch.save(
        {
            "weights": {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad},
            "optimizer": trainer.optimizer.state_dict()["state"],
            "skipped": [log["policy/updates_skipped"] for log in trainer.state.log_history if "reward" in log],
            "decisions": decisions(trainer) if num_processes == 2 else [],
            "metrics": trainer.evaluate(),  # five prompts on two processes
        },
        f"{output_dir}/rank-{trainer.args.process_index}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
