"""A training run for tests/test_processes.py, started by `torchrun` in one process or several."""

import sys

import torch
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.advantages import PromptStatistics


SAMPLES_PER_ROUND = 8


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step, which every process has after synchronisation."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            parameters = dict(model.named_parameters())
            self.gradients = {name: p.grad.clone() for name, p in parameters.items() if p.requires_grad}


def main(output_dir: str, num_processes: int) -> None:
    config = DDPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        num_train_epochs=2,
        num_inference_steps=3,
        per_device_sample_batch_size=2,
        num_sample_batches=SAMPLES_PER_ROUND // 2 // num_processes,
        per_device_train_batch_size=2,
        advantage_normalization="prompt",
        per_prompt_stat_tracking_min_count=2,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        optim="sgd",
    )
    recorder = FirstGradient()
    prompts = ["cat", "dog", "owl"]
    trainer = DDPOTrainer(config, brightness, prompts, tiny_pipeline(), callbacks=[recorder], eval_prompts=prompts)
    assert config.world_size == num_processes, "not started as asked"
    trainer.train()
    samples = trainer.generate_samples()
    assert isinstance(trainer.normalize, PromptStatistics)
    torch.save(
        {
            "gradients": recorder.gradients,
            "weights": {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad},
            "statistics": trainer.normalize.state_dict(),
            "rewards": [log["reward"] for log in trainer.state.log_history if "reward" in log],
            "images": trainer.rollout.images,
            "evaluation": (samples.prompts, samples.images),
        },
        f"{output_dir}/rank-{trainer.args.process_index}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
