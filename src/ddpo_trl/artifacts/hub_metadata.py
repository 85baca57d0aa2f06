"""Hub metadata of a pipeline: base model, license and task."""

import os
from functools import cache
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging
from yaml import YAMLError

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.pipeline import makes_video


logger = logging.get_logger(__name__)


def hub_name(pipeline: DiffusionPipeline) -> str | None:
    """Return the Hub id that a pipeline was loaded from; `None` for a local path."""
    name = str(pipeline.name_or_path or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name and not os.path.exists(name) else None


@cache
def license_of(base_model: str | None) -> dict[str, Any]:
    """Return the license metadata of the base model, which apply to its adapters too; empty if unknown."""
    if base_model is None:
        return {}
    try:
        data = ModelCard.load(base_model, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError, HTTPError) as error:  # no network, no card, no metadata
        logger.info(f"The license of {base_model} is not in the model card, because its card can't be read: {error}")
        return {}
    fields = {name: data[name] for name in ("license", "license_name", "license_link") if name in data}
    link = fields.get("license_link")
    if link is not None and "://" not in link:  # a file next to that card
        fields["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return fields


def pipeline_tag(pipeline: DiffusionPipeline, config: DDPOConfig) -> str:
    """Return the Hub's task of a pipeline, such as `"text-to-image"`."""
    given = {*(config.pipeline_inputs or ()), *(config.pipeline_kwargs or ())}
    source = "image" if "image" in given else "text"
    return f"{source}-to-{'video' if makes_video(pipeline) else 'image'}"
