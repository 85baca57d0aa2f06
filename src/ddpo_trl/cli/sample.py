"""`ddpo-trl sample`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from ddpo_trl.artifacts.checkpoints import CONFIG_NAME
from ddpo_trl.artifacts.plots import ImageRow, can_draw, save_comparison
from ddpo_trl.cli.arguments import CommandParser, Gather
from ddpo_trl.cli.errors import UsageError, one_line, usage_errors
from ddpo_trl.cli.sources import first_prompts, load_prompt_source, load_reward
from ddpo_trl.cli.train import SETTINGS_NAME
from ddpo_trl.config import DDPOConfig
from ddpo_trl.finite import finite_rows
from ddpo_trl.policy.adapter_files import LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME, has_lora_loader, quiet
from ddpo_trl.policy.denoiser import active_adapters, adapters_off, denoiser_name
from ddpo_trl.policy.loading import Dtype, load_pipeline
from ddpo_trl.policy.lora import ADAPTER_NAME
from ddpo_trl.policy.policy import Policy
from ddpo_trl.prompts import PromptPair
from ddpo_trl.rewards.model import as_pictures
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.settings import Count, documented, setting


# Settings of a run that its images depend on.
KEPT = ("num_inference_steps", "guidance_scale", "pipeline_kwargs", "pipeline_inputs")


@documented()
@dataclass
class SampleArguments:
    """
    Arguments of `ddpo-trl sample` in addition to the folder. Model, prompts, steps and guidance default to the run's.
    """

    model: str | None = setting(None, "Pipeline without the LoRA weights: a folder, a Hub id, or emoji.")
    dtype: Dtype = setting("float32", "Precision in which the pipeline is loaded.")
    prompt: list[str] | None = setting(None, "The prompts themselves.", action=Gather)
    prompts: str | None = setting(None, "Source of the prompts: a file, a dataset, module:function or a list.")
    prompt_column: str | None = setting(None, "Column of the prompts in a file or dataset; `prompt` by default.")
    prompt_split: str = setting("train", "Split of a dataset.")
    num_prompts: Count = setting(8, "Number of prompts, the first ones of --prompts.")
    seed: int = setting(0, "First seed.")
    num_seeds: Count = setting(1, "Number of images per prompt, with consecutive seeds.")
    reward: list[str] | None = setting(
        None, "Reward functions whose sum is shown below each image, as in ddpo-trl train.", action=Gather
    )
    num_inference_steps: int | None = setting(None, "Number of denoising steps.")
    guidance_scale: float | None = setting(None, "Scale of classifier-free guidance.")
    batch_size: Count = setting(4, "Number of images sampled at once.")
    use_cpu: bool = setting(False, "Whether to use the CPU although there is a GPU.")
    output: str | None = setting(None, "Output file; `sheet.png` in the folder by default.", aliases=["-o"])


def main(argv: Sequence[str]) -> int:
    """Draw a sheet of the same prompts and seeds without and with the LoRA weights of a run."""
    parser = CommandParser(
        [SampleArguments],
        "ddpo-trl sample",
        "Compare images of the same prompts and seeds, without and with the LoRA weights of a run or checkpoint. "
        "Model, prompts, steps and guidance default to those of the run, if ddpo-trl train started it.",
        example="FOLDER --prompt 'cat face' pizza --num_seeds 2",
    )
    parser.add_argument("folder", metavar="FOLDER", help="Folder with the LoRA weights.")
    (arguments, rest), _ = parser.parse(argv)
    folder = Path(rest.folder)
    if not any((folder / name).is_file() for name in (LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME)):
        raise UsageError(f"{folder} has no LoRA weights, neither {LORA_WEIGHTS_NAME} nor {PEFT_WEIGHTS_NAME}.")
    if not can_draw():
        raise UsageError("The sheet is drawn by matplotlib, which is not installed: pip install 'ddpo_trl[plots]'.")
    path = Path(arguments.output or folder / "sheet.png")
    with usage_errors():
        pairs = sample_prompts(arguments, folder)
        policy = load_policy(arguments, folder)
        scorer = RewardScorer([load_reward(name) for name in arguments.reward or ()]) if arguments.reward else None
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = make_rows(arguments, policy, scorer, pairs)
    save_comparison(rows, [prompt for prompt, _ in pairs], path)
    print(f"Saved {path}")
    return 0


def run_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that `ddpo-trl train` saved for the run of a folder; empty if it was not used."""
    for place in (folder, folder.parent):
        if (place / SETTINGS_NAME).is_file():
            settings: dict[str, Any] = yaml.safe_load((place / SETTINGS_NAME).read_text())
            return settings
    return {}


def base_model(folder: Path) -> str:
    """Return the pipeline that a run fine-tuned, from its settings or its model card."""
    card = folder / "README.md"
    model = run_settings(folder).get("model") or (card.is_file() and ModelCard.load(card).data.base_model)
    if not model:
        raise UsageError(f"{folder} does not name the pipeline that was trained; give --model.")
    return str(model)


def sample_prompts(arguments: SampleArguments, folder: Path) -> list[PromptPair]:
    """Return the given prompts, or else the first ones of the run's evaluation or training."""
    if arguments.prompt is not None:
        return [(prompt, {}) for prompt in arguments.prompt]
    settings = run_settings(folder) if arguments.prompts is None else {}
    source = arguments.prompts or settings.get("eval_prompts") or settings.get("prompts")
    if source is None:
        raise UsageError(f"{folder} does not name the prompts of a run; give --prompt or --prompts.")
    column = arguments.prompt_column or settings.get("prompt_column")
    split = settings.get("prompt_split", arguments.prompt_split)
    return first_prompts(load_prompt_source(source, column, split), arguments.num_prompts)


def load_policy(arguments: SampleArguments, folder: Path) -> Policy:
    """Load the pipeline with the folder's adapter and the settings of the run."""
    pipeline = load_pipeline(arguments.model or base_model(folder), arguments.dtype)
    saved: dict[str, Any] = {}
    for place in (folder.parent, folder):
        if (place / CONFIG_NAME).is_file():
            saved = json.loads((place / CONFIG_NAME).read_text())
    chosen = {name: saved[name] for name in KEPT if name in saved}
    chosen |= {name: vars(arguments)[name] for name in KEPT[:2] if vars(arguments)[name] is not None}
    config = DDPOConfig(output_dir=str(folder), use_cpu=arguments.use_cpu, report_to="none", **chosen)
    policy = with_saved_adapter(pipeline, config, folder)
    pipeline.to(config.device)
    return policy


def with_saved_adapter(pipeline: DiffusionPipeline, config: DDPOConfig, folder: Path) -> Policy:
    """Return the policy with the adapter in a folder, converted by `load_lora_weights` if another tool wrote it."""
    try:
        if not has_lora_loader(pipeline):
            policy = Policy.from_pipeline(pipeline, config, PeftConfig.from_pretrained(str(folder)))
            policy.load(folder)
            return policy
        with quiet():
            loader: Any = pipeline
            loader.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS_NAME, adapter_name=ADAPTER_NAME)
    except Exception as error:  # converters raise errors of all kinds, torch lists every weight
        raise UsageError(
            f"The LoRA weights in {folder} don't fit {pipeline.name_or_path} ({one_line(error)}). Give the --model "
            "that they belong to."
        ) from error
    check_that_all_is_loaded(pipeline, folder / LORA_WEIGHTS_NAME)
    return Policy.from_pipeline(pipeline, config)


def check_that_all_is_loaded(pipeline: DiffusionPipeline, file: Path) -> None:
    """Raise a [`~ddpo_trl.cli.errors.UsageError`] if weights of a file are missing in the denoiser."""
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    unused = keys = {*load_file(file)}
    if active_adapters(denoiser):
        loaded = {f"{name}.{key}" for key in get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)}
        ours = {key for key in keys if key.startswith(f"{name}.") and (".lora_A." in key or ".lora_B." in key)}
        unused = ours - loaded
    if unused or not keys:
        raise UsageError(
            f"{len(unused)} of the {len(keys)} weights in {file} don't belong to the {name} of "
            f"{pipeline.name_or_path}, such as {min(unused, default='none')}. Give the --model that they were trained "
            "for."
        )


def make_rows(
    arguments: SampleArguments, policy: Policy, scorer: RewardScorer | None, pairs: Sequence[PromptPair]
) -> list[ImageRow]:
    """Return two rows per seed, without and with the adapter, which must differ."""
    rows = []
    changed = False
    for seed in range(arguments.seed, arguments.seed + arguments.num_seeds):
        suffix = f", seed {seed}" if arguments.num_seeds > 1 else ""
        with adapters_off(policy.denoiser):
            before = make_images(policy, pairs, seed, arguments.batch_size)
        after = make_images(policy, pairs, seed, arguments.batch_size)
        changed = changed or not torch.equal(before, after)
        rows += [
            make_row(title + suffix, images, scorer, pairs) for title, images in (("before", before), ("after", after))
        ]
    if not changed:
        raise UsageError("The LoRA weights change nothing in these images: they are untrained, or not for these.")
    return rows


def make_images(policy: Policy, pairs: Sequence[PromptPair], seed: int, batch_size: int) -> Tensor:
    """Return one image per prompt, on the CPU: `(N, 3, H, W)`, or `(N, F, 3, H, W)` for video."""
    images = []
    for first in range(0, len(pairs), batch_size):
        prompts, metadata = zip(*pairs[first : first + batch_size], strict=True)
        images.append(policy.generate(policy.context(prompts, metadata, [seed] * len(prompts))).cpu())
        if not finite_rows(images[-1]).all():
            raise UsageError(
                f"Images of the prompts {list(prompts)} are not finite: the denoiser or the autoencoder overflowed, "
                "or the LoRA weights diverged. Try --dtype float32 or bfloat16."
            )
    return torch.cat(images)


def make_row(title: str, images: Tensor, scorer: RewardScorer | None, pairs: Sequence[PromptPair]) -> ImageRow:
    """Return a row of the sheet, which shows the middle frame of a video."""
    prompts, metadata = zip(*pairs, strict=True)
    rewards: list[float | None] = [None] * len(pairs)
    if scorer is not None:
        rewards = scorer.total(scorer.submit(images, prompts, metadata, when="sampling").result()).tolist()
    shown = images[:, images.shape[1] // 2] if images.ndim == 5 else images
    return ImageRow(title=title, images=as_pictures(shown), rewards=rewards)
