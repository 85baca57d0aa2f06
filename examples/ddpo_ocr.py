"""
Legible text with Stable Diffusion 3.5: the reward is the accuracy of text recognition (`pip install ddpo_trl[ocr]`).

```bash
python examples/ddpo_ocr.py

# On a CPU, without a download: the emoji pipeline. It can't learn to write; this checks the installation, including
# text recognition.
python examples/ddpo_ocr.py --embedded --num_inference_steps 10 --num_train_epochs 2
```

The text rendering task of Flow-GRPO (https://huggingface.co/papers/2505.05470). The requested text is in double
quotation marks in the prompt, or in the metadata under "text", as here.
"""

from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusion3Pipeline
from trl import TrlParser

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.prompts import fill_template
from ddpo_trl.rewards import OCRAccuracy


PROMPTS = fill_template(
    'a {place} that says "{text}"',
    place=["shop sign", "birthday cake", "t-shirt", "street sign", "book cover", "chalkboard", "neon light"],
    text=["OPEN", "Hello World", "New York", "Back at five", "DREAM BIG", "No parking", "Page 42", "Thank you"],
)


@dataclass
class ScriptArguments:
    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "Pipeline to train: Hub id or folder."}
    )
    size: int = field(default=512, metadata={"help": "Width and height of the images."})
    embedded: bool = field(default=False, metadata={"help": "Train the emoji pipeline, without a download."})


def main() -> None:
    parser = TrlParser([ScriptArguments, DDPOConfig])
    parser.set_defaults(
        output_dir="outputs/ocr",
        num_train_epochs=200,
        num_inference_steps=10,
        guidance_scale=4.5,
        noise_level=0.7,
        train_timestep_range=[0.0, 0.9],
        per_device_sample_batch_size=8,
        num_sample_batches=12,
        num_images_per_prompt=8,
        advantage_normalization="group",
        per_device_train_batch_size=8,
        num_mini_batches=2,
        cliprange=2.5e-5,
        kl_coef=1e-3,
        gradient_checkpointing=True,
        offload_text_encoders=True,
    )
    arguments, config = parser.parse_args_and_config()
    if arguments.embedded:
        pipeline = load_emoji_pipeline()
    else:
        pipeline = StableDiffusion3Pipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)
        config.pipeline_kwargs = {"height": arguments.size, "width": arguments.size} | (config.pipeline_kwargs or {})
    trainer = DDPOTrainer(config, OCRAccuracy(), PROMPTS, pipeline)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
