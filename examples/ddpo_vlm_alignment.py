"""
Prompt alignment, judged by a vision-language model. The paper's task: animals wash dishes, ride bikes, play chess.

```bash
python examples/ddpo_vlm_alignment.py
python examples/ddpo_vlm_alignment.py --mode caption --judge llava-hf/llava-1.5-7b-hf  # the paper's reward

# On a CPU, without a download: the emoji pipeline, its captions and its own alignment reward. With --judge, that model
# judges the emoji.
python examples/ddpo_vlm_alignment.py --embedded --num_inference_steps 10 --num_train_epochs 5
```

If the judge does not fit on the GPU together with the pipeline, it can run in another process: see
`ddpo_remote_reward.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers import StableDiffusionPipeline
from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.emoji import emoji_captions
from ddpo_trl.prompts import animal_activities
from ddpo_trl.rewards import EmojiAlignment, VLMJudge


@dataclass
class ScriptArguments:
    model: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Pipeline to train: Hub id or folder."},
    )
    judge: str | None = field(default=None, metadata={"help": "Judge, HuggingFaceTB/SmolVLM-Instruct by default."})
    mode: Literal["question", "caption"] = field(
        default="question", metadata={"help": "Ask whether the image shows the prompt, or compare a description."}
    )
    embedded: bool = field(default=False, metadata={"help": "Train the emoji pipeline, without a download."})


def main() -> None:
    parser = TrlParser([ScriptArguments, DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/vlm-alignment",
        num_train_epochs=200,
        num_inference_steps=50,
        per_device_sample_batch_size=6,
        num_sample_batches=8,
        per_device_train_batch_size=6,
        num_mini_batches=2,
        advantage_normalization="prompt",
        per_prompt_stat_tracking_buffer_size=32,
    )
    arguments, config = parser.parse_args_and_config()
    if arguments.embedded:
        pipeline, prompts = load_emoji_pipeline(), emoji_captions("animal")
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16, safety_checker=None)
        prompts = [prompt for prompt, _ in animal_activities()]
    if arguments.embedded and arguments.judge is None:
        trainer = DDPOTrainer(config, EmojiAlignment(), prompts, pipeline)
    else:
        judge = VLMJudge(arguments.judge or "HuggingFaceTB/SmolVLM-Instruct", mode=arguments.mode)
        trainer = DDPOTrainer(config, judge, prompts, pipeline)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
