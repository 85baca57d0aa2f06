"""A run for tests/test_processes.py, started by `accelerate launch` with one of the example configs."""

import os
import sys
from functools import partialmethod
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.distributed import whole


BATCHES_PER_ROUND = 4


class Placement(TrainerCallback):
    """What part of the denoiser's weights this process holds while it trains."""

    def __init__(self):
        self.held = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        self.held = sum(p.numel() for p in local) / sum(p.numel() for p in model.parameters())


def make_config(output_dir: str, num_rounds: int, precision: str, use_lora: bool, use_cpu: bool) -> DDPOConfig:
    return DDPOConfig(
        output_dir=output_dir,
        use_cpu=use_cpu,
        bf16=precision == "bf16",
        use_lora=use_lora,
        disable_tqdm=True,
        report_to="none",
        log_images_rounds=1,
        num_logged_images=2,
        num_train_epochs=num_rounds,
        num_inference_steps=3,
        guidance_scale=3.0,
        per_device_sample_batch_size=2,
        num_sample_batches=BATCHES_PER_ROUND // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_train_batch_size=2,
        num_mini_batches=2,
        kl_coef=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        learning_rate=1e-2,
    )


def start(output_dir: str, num_rounds: int, precision: str, use_lora: bool) -> tuple[DDPOConfig, Any]:
    """
    The config and a pipeline. FSDP and DeepSpeed run on a CPU too, but accelerate gives them to accelerators only: it
    is told that the CPU is one, and then does to it what it does to GPUs.
    """
    pipeline = tiny_pipeline()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if precision == "bf16":  # for the weights as they are loaded: under DeepSpeed there is no other way
            pipeline.to(torch.bfloat16)
        return make_config(output_dir, num_rounds, "no", use_lora, use_cpu=False), pipeline
    config = make_config(output_dir, num_rounds, precision, use_lora, use_cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return config, pipeline


def run(output_dir: str, num_rounds: int, resume: bool = False, precision: str = "no", use_lora: bool = True) -> Any:
    """What a run ends with."""
    config, pipeline = start(output_dir, num_rounds, precision, use_lora)
    placement = Placement()
    prompts = ["cat", "dog", "owl"]
    trainer = DDPOTrainer(config, brightness, prompts, pipeline, callbacks=[placement], eval_prompts=prompts)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return {
        "weights": whole({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}),
        "held": placement.held,
        "deviations": [log["val/ratio_deviation"] for log in trainer.state.log_history if "reward" in log],
        "evaluation": trainer.generate_samples().images,
    }


def main(output_dir: str, unsharded: bool = False) -> None:
    """Without shards only the runs that those with shards are compared with."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # It goes by the argument whether it is DeepSpeed, and by the state for everything else.
        PartialState.__init__ = partialmethod(PartialState.__init__, True)
    results = {"whole": run(f"{output_dir}/whole", 2), "full": run(f"{output_dir}/full", 1, use_lora=False)}
    if not unsharded:
        run(f"{output_dir}/parts", 1)
        results["resumed"] = run(f"{output_dir}/parts", 2, resume=True)
        results["half"] = run(f"{output_dir}/half", 1, precision="bf16")
    torch.save(results, f"{output_dir}/rank-{PartialState().process_index}.pt")
    PartialState().destroy_process_group()  # or its threads may be cut off when the process exits


if __name__ == "__main__":
    main(sys.argv[1])
