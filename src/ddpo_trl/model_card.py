"""The model card that goes to the Hub beside the weights."""

import os
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ddpo_trl.config import DDPOConfig


# A card shows at most this many points of the reward curve.
MAX_REWARD_ROWS = 10


def write_model_card(
    path: str | os.PathLike[str],
    *,
    model_name: str,
    base_model: str,
    pipeline_class: str,
    tags: list[str],
    dataset_name: str | None,
    reward_names: Sequence[str],
    log_history: Sequence[dict[str, Any]],
    settings: DDPOConfig,
    paper: dict[str, str],
    prompt: str = "a prompt",
) -> None:
    """
    Renders the card.

    Args:
        path (`str` or `os.PathLike`):
            Where to.
        model_name (`str`):
            Heading, and the name it is loaded by.
        base_model (`str`):
            What the pipeline was loaded from. A path on this machine means nothing to others and is left out.
        pipeline_class (`str`):
            Class of the pipeline.
        tags (`list[str]`):
            Tags of the metadata.
        dataset_name (`str`, *optional*):
            Hub id of the prompts' dataset.
        reward_names (`Sequence[str]`):
            Names of the reward functions.
        log_history (`Sequence[dict]`):
            The Trainer's logs.
        settings ([`DDPOConfig`]):
            Settings of the run.
        paper (`dict[str, str]`):
            Title, id and citation.
        prompt (`str`, *optional*):
            The prompt of the example.
    """
    public_base = None if not base_model or os.path.exists(base_model) else base_model
    card_data = ModelCardData(
        library_name="diffusers",
        base_model=public_base,
        pipeline_tag="text-to-image",
        tags=tags,
        datasets=dataset_name,
    )
    curve = [(log["episode"], log["reward"]) for log in log_history if "reward" in log]
    stride = max(1, len(curve) // MAX_REWARD_ROWS)
    ModelCard.from_template(
        card_data,
        template_path=str(files("ddpo_trl") / "assets" / "model_card.md"),
        model_name=model_name,
        base_model=public_base,
        pipeline_class=pipeline_class,
        dataset_name=dataset_name,
        reward_names=list(reward_names),
        rewards=curve[::stride],
        settings=vars(settings),
        paper=paper,
        prompt=prompt,
    ).save(path)
