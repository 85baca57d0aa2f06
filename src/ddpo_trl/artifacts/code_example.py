"""Example code in the model card: loads the trained model and generates an image."""

import ast
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from PIL.Image import Image

from ddpo_trl.artifacts.hub_metadata import hub_name
from ddpo_trl.config import DDPOConfig
from ddpo_trl.emoji import EMOJI_PATH
from ddpo_trl.policy.adapter_files import has_lora_loader
from ddpo_trl.policy.policy import Policy
from ddpo_trl.versions import DTYPE


# The scheduler is saved too, since it may have been replaced after loading and images depend on it.
SCHEDULER_FOLDER = "scheduler"


def example(
    policy: Policy, config: DDPOConfig, repo_id: str, prompt: str, task: str, inputs: Mapping[str, Any]
) -> str:
    """Return Python code that loads the model and generates an image as evaluation does."""
    pipeline, component = policy.pipeline, policy.denoiser_name
    pipeline_class, scheduler_class = type(pipeline).__name__, type(pipeline.scheduler).__name__
    where = f'"{repo_id}"' + (f', revision="{config.hub_revision}"' if config.hub_revision else "")
    imports, arguments = [], ""
    classes = [pipeline_class, scheduler_class]
    after = [f'pipeline.scheduler = {scheduler_class}.from_pretrained({where}, subfolder="{SCHEDULER_FOLDER}")']
    if policy.adapter is None:
        model_class = type(policy.denoiser).__name__
        classes.append(model_class)
        arguments = f', {component}={model_class}.from_pretrained({where}, subfolder="{component}")'
    elif has_lora_loader(pipeline):
        after.append(f"pipeline.load_lora_weights({where})")
    else:
        imports.append("from peft import PeftModel")
        after.append(f"PeftModel.from_pretrained(pipeline.{component}, {where})  # adds the adapter in place")
    base = f'"{hub_name(pipeline) or "path/to/the/base/pipeline"}"'
    if str(pipeline.name_or_path) == str(EMOJI_PATH):
        imports.append("from ddpo_trl.emoji import EMOJI_PATH")
        base = "EMOJI_PATH"
    dtype = policy.denoiser.dtype  # an adapter may have another dtype
    quantization = written_quantization(policy.denoiser)
    # The default is float32; that of quantized networks is another one for each method.
    precision = f", {DTYPE}={dtype}" if quantization or dtype in (torch.float16, torch.bfloat16) else ""
    if precision:
        imports.insert(0, "import torch")
    before = []
    if quantization:
        model_class, quantization_class = type(policy.denoiser).__name__, quantization.partition(".")[0]
        classes += [model_class, quantization_class]
        source = f'{base}, subfolder="{component}"{precision}'
        before += [
            f"quantization = {quantization}",
            f"{component} = {model_class}.from_pretrained({source}, quantization_config=quantization)",
        ]
        arguments += f", {component}={component}"
    arguments += precision
    written, defined = written_arguments(config, inputs)
    if any("load_image(" in line for line in defined):
        imports.append("from diffusers.utils import load_image")
    imports.insert(imports[:1] == ["import torch"], f"from diffusers import {', '.join(classes)}")
    load = f"pipeline = {pipeline_class}.from_pretrained({base}{arguments})"
    result, field = ("video", "frames") if task.endswith("video") else ("image", "images")
    call = f"{result} = pipeline({', '.join([json.dumps(prompt, ensure_ascii=False), *written])}).{field}[0]"
    return "\n".join([*imports, "", *before, load, *after, *defined, call])


def written_quantization(denoiser: ModelMixin) -> str:
    """Write the config by which a denoiser was quantized when it was loaded; empty if its files are quantized."""
    quantizer = vars(denoiser).get("hf_quantizer")
    if quantizer is None or quantizer.pre_quantized:
        return ""
    config = quantizer.quantization_config
    return f"{type(config).__name__}.from_dict({json.loads(json.dumps(config.to_dict(), default=str))!r})"


def written_arguments(config: DDPOConfig, inputs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """
    Write the arguments of the pipeline call as in evaluation; `inputs` are the prompt's `config.pipeline_inputs`.

    Returns:
        Arguments in Python, and lines before the call that define the arguments without a literal.
    """
    assert not isinstance(config.pipeline_kwargs, str), "DDPOConfig parses strings"
    values: dict[str, Any] = {"num_inference_steps": config.num_inference_steps}
    if config.guidance_scale is not None:
        values["guidance_scale"] = config.guidance_scale
    values |= {**(config.pipeline_kwargs or {}), **{name: inputs.get(name) for name in config.pipeline_inputs or ()}}
    written, defined = [], []
    for name, value in values.items():
        value = value.item() if isinstance(value, np.generic) else value
        is_picture = isinstance(value, Image) or (value is None and name.endswith("image"))
        if is_literal(value) and not is_picture:
            written.append(f"{name}={value!r}")
            continue
        written.append(f"{name}={name}")
        source = f'load_image("{name}.png")' if is_picture else f"...  # the {type(value).__name__} of the run"
        defined.append(f"{name} = {source}")
    return written, defined


def is_literal(value: Any) -> bool:
    """Return whether the `repr` of a value is a Python literal."""
    try:
        ast.literal_eval(repr(value))
    except (SyntaxError, ValueError):
        return False
    return True
