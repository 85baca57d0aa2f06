"""`ddpo-trl sample`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from ddpo_trl.artifacts.checkpoints import CONFIG_NAME
from ddpo_trl.artifacts.plots import ImageRow, save_comparison
from ddpo_trl.cli.arguments import CommandParser, Gather
from ddpo_trl.cli.errors import UsageError, one_line, usage_errors
from ddpo_trl.cli.sources import first_prompts, load_model, load_prompt_source, load_reward
from ddpo_trl.cli.train import SETTINGS_NAME
from ddpo_trl.config import DDPOConfig
from ddpo_trl.finite import finite_rows
from ddpo_trl.policy.adapter_files import LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME, has_lora_loader, load_adapter, quiet
from ddpo_trl.policy.denoiser import adapter_layers, adapters_off, denoiser_name
from ddpo_trl.policy.lora import ADAPTER_NAME, add_adapter
from ddpo_trl.policy.policy import Policy
from ddpo_trl.prompts import PromptPair
from ddpo_trl.rewards.model import as_pictures
from ddpo_trl.rewards.scoring import RewardScorer


# Settings of a run by which its images are made; the others are those of training.
KEPT = ("num_inference_steps", "guidance_scale", "pipeline_kwargs", "pipeline_inputs")


@dataclass
class SampleArguments:
    """
    What `ddpo-trl sample` takes beside the folder. What is not given is as in the run.

    Args:
        model (`str`, *optional*):
            The pipeline without the LoRA weights, see [`~ddpo_trl.cli.sources.load_model`].
        dtype (`str`, *optional*, defaults to `"float32"`):
            In which it is loaded.
        prompt (`list[str]`, *optional*):
            The prompts themselves.
        prompts (`str`, *optional*):
            Where to take them from, see [`~ddpo_trl.cli.sources.load_prompt_source`].
        prompt_column (`str`, *optional*):
            The column of a file or dataset with the prompts.
        prompt_split (`str`, *optional*, defaults to `"train"`):
            The split of a dataset.
        num_prompts (`int`, *optional*, defaults to `8`):
            How many of `prompts` are shown, the first ones.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the first images.
        num_seeds (`int`, *optional*, defaults to `1`):
            Images of each prompt, with seeds from `seed` on.
        reward (`list[str]`, *optional*):
            Reward functions whose sum is shown below each image, see [`~ddpo_trl.cli.sources.load_reward`].
        num_inference_steps (`int`, *optional*):
            Denoising steps.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance.
        batch_size (`int`, *optional*, defaults to `4`):
            Images made at once.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave the GPU alone.
        output (`str`, *optional*):
            The picture, `sheet.png` in the folder by default.
    """

    model: str | None = field(default=None, metadata={"help": "The pipeline: a folder, a Hub id, emoji."})
    dtype: str = field(default="float32", metadata={"help": "In which it is loaded: bfloat16, float16."})
    prompt: list[str] | None = field(default=None, metadata={"help": "The prompts themselves.", "action": Gather})
    prompts: str | None = field(default=None, metadata={"help": "A file, dataset, module:function or list of them."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the prompts, if not `prompt`."})
    prompt_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    num_prompts: int = field(default=8, metadata={"help": "How many of --prompts are shown."})
    seed: int = field(default=0, metadata={"help": "Seed of the first images."})
    num_seeds: int = field(default=1, metadata={"help": "Images of each prompt."})
    reward: list[str] | None = field(
        default=None, metadata={"help": "Built-in reward, module:function or URL, to be shown.", "action": Gather}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Denoising steps."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Classifier-free guidance."})
    batch_size: int = field(default=4, metadata={"help": "Images made at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave the GPU alone."})
    output: str | None = field(
        default=None, metadata={"help": "The picture; sheet.png in the folder if not given.", "aliases": ["-o"]}
    )

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_seeds", "batch_size"):
            if (value := vars(self)[name]) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")


def main(argv: Sequence[str]) -> int:
    """Makes a sheet of the same prompts and seeds with and without a run's LoRA weights."""
    parser = CommandParser(
        [SampleArguments],
        "ddpo-trl sample",
        "Lay images of the same prompts and seeds side by side, without and with the LoRA weights of a run or of one "
        "of its checkpoints. What is not given is as in the run, if it was started by ddpo-trl train.",
        example="FOLDER --prompt 'cat face' pizza --num_seeds 2",
    )
    parser.add_argument("folder", metavar="FOLDER", help="Where the LoRA weights are.")
    arguments, rest = parser.parse(argv)
    folder = Path(rest.folder)
    if not any((folder / name).is_file() for name in (LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME)):
        raise UsageError(f"{folder} has no LoRA weights, neither {LORA_WEIGHTS_NAME} nor {PEFT_WEIGHTS_NAME}.")
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
    """Return the arguments that `ddpo-trl train` got in the run of a folder; empty if it was not used."""
    for place in (folder, folder.parent):
        if (place / SETTINGS_NAME).is_file():
            settings: dict[str, Any] = yaml.safe_load((place / SETTINGS_NAME).read_text())
            return settings
    return {}


def base_model(folder: Path) -> str:
    """
    What a run fine-tuned, by its settings or its model card.

    Raises:
        [`~ddpo_trl.cli.errors.UsageError`]: If neither says it.
    """
    if "model" in (settings := run_settings(folder)):
        return str(settings["model"])
    card = folder / "README.md"
    if card.is_file() and (base := ModelCard.load(card).data.base_model):
        return str(base)
    raise UsageError(f"{folder} does not say which pipeline it belongs to; give --model.")


def sample_prompts(arguments: SampleArguments, folder: Path) -> list[PromptPair]:
    """The prompts that are shown: those given, or else the first ones of the run's evaluation or training."""
    if arguments.prompt is not None:
        return [(prompt, {}) for prompt in arguments.prompt]
    column, split = arguments.prompt_column, arguments.prompt_split
    source = arguments.prompts
    if source is None:
        settings = run_settings(folder)
        source = settings.get("eval_prompts") or settings.get("prompts")
        column, split = column or settings.get("prompt_column"), settings.get("prompt_split", split)
    if source is None:
        raise UsageError(f"{folder} does not say which prompts were used; give --prompt or --prompts.")
    return first_prompts(load_prompt_source(source, column, split), arguments.num_prompts)


def load_policy(arguments: SampleArguments, folder: Path) -> Policy:
    """The pipeline with the folder's adapter, and the settings of the run."""
    pipeline = load_model(arguments.model or base_model(folder), arguments.dtype)
    saved: dict[str, Any] = {}
    for place in (folder.parent, folder):
        if (place / CONFIG_NAME).is_file():
            saved = json.loads((place / CONFIG_NAME).read_text())
    chosen = {name: saved[name] for name in KEPT if name in saved}
    chosen |= {name: vars(arguments)[name] for name in KEPT[:2] if vars(arguments)[name] is not None}
    config = DDPOConfig(output_dir=str(folder), use_cpu=arguments.use_cpu, report_to="none", **chosen)
    adapter = put_on_saved_adapter(pipeline, folder)
    pipeline.to(config.device)
    return Policy(pipeline, config, adapter)


def put_on_saved_adapter(pipeline: DiffusionPipeline, folder: Path) -> str:
    """
    Gives a pipeline the adapter in a folder, as `pipeline.load_lora_weights(folder)` does: of other tools as well, if
    diffusers can convert them.

    Returns:
        `str`: The adapter's name.

    Raises:
        [`~ddpo_trl.cli.errors.UsageError`]: If some of it is not for the pipeline's denoiser.
    """
    try:
        if not has_lora_loader(pipeline):
            adapter = add_adapter(pipeline, PeftConfig.from_pretrained(str(folder)))
            load_adapter(pipeline, adapter, folder)
            return adapter
        with quiet():
            loader: Any = pipeline
            loader.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS_NAME, adapter_name=ADAPTER_NAME)
    except Exception as error:  # converters raise what they come across, torch lists every weight
        raise UsageError(
            f"The LoRA weights in {folder} don't fit {pipeline.name_or_path} ({one_line(error)}). Give the --model "
            "that they belong to."
        ) from error
    check_that_all_is_loaded(pipeline, folder / LORA_WEIGHTS_NAME)
    for layer in adapter_layers(pipeline.components[denoiser_name(pipeline)]):
        layer.set_adapter(ADAPTER_NAME)
    return ADAPTER_NAME


def check_that_all_is_loaded(pipeline: DiffusionPipeline, file: Path) -> None:
    """Raises a [`~ddpo_trl.cli.errors.UsageError`] if the denoiser has not got all weights of a file."""
    name = denoiser_name(pipeline)
    others = [
        other
        for other, component in pipeline.components.items()
        if other != name and isinstance(component, nn.Module) and adapter_layers(component)
    ]
    if others:
        raise UsageError(
            f"{file} has weights for {' and '.join(others)} too, and a sheet compares those of the {name} only. Load "
            "it with `pipeline.load_lora_weights` to use all of it."
        )
    denoiser = pipeline.components[name]
    keys = set(load_file(file))
    loaded = set(get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)) if adapter_layers(denoiser) else set()
    ours = {key for key in keys if key.startswith(f"{name}.") and (".lora_A." in key or ".lora_B." in key)}
    unused = ours - {f"{name}.{key}" for key in loaded}
    if not loaded or unused:
        raise UsageError(
            f"{len(unused) if loaded else len(keys)} of the {len(keys)} weights in {file} don't belong to the {name} "
            f"of {pipeline.name_or_path}, such as {min(unused if loaded else keys, default='none')}. Give the --model "
            "that they were trained for."
        )


def make_rows(
    arguments: SampleArguments, policy: Policy, scorer: RewardScorer | None, pairs: Sequence[PromptPair]
) -> list[ImageRow]:
    """
    Two rows for each seed, without and with the adapter.

    Raises:
        [`~ddpo_trl.cli.errors.UsageError`]: If there is no difference between the two.
    """
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
        raise UsageError("The LoRA weights change nothing in these images: they were not trained, or not for this.")
    return rows


def make_images(policy: Policy, pairs: Sequence[PromptPair], seed: int, batch_size: int) -> Tensor:
    """One image of each prompt, on the CPU: `(N, 3, H, W)`, or `(N, F, 3, H, W)` for video."""
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
    """A row of the sheet; of a video it shows the frame in the middle."""
    prompts, metadata = zip(*pairs, strict=True)
    rewards: list[float | None] = [None] * len(pairs)
    if scorer is not None:
        rewards = scorer.total(scorer.submit(images, prompts, metadata, when="sampling").result()).tolist()
    shown = images[:, images.shape[1] // 2] if images.ndim == 5 else images
    return ImageRow(title=title, images=as_pictures(shown), rewards=rewards)
