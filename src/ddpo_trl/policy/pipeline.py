"""Arguments that a diffusers pipeline needs to run as a policy, and its copy with a policy scheduler."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from diffusers import CacheMixin, DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor, nn

from ddpo_trl.config import DDPOConfig
from ddpo_trl.config_checks import OWN_PIPELINE_ARGUMENTS
from ddpo_trl.descriptions import DIGITS, described, digest
from ddpo_trl.policy.denoiser import denoiser_name
from ddpo_trl.policy.embedding_calls import PER_SAMPLE_PREFIXES
from ddpo_trl.policy.embeddings import PromptEncoder, text_encoders
from ddpo_trl.policy.schedulers import PolicyScheduler


# Without these arguments of `__call__` there is nothing to ask for an image.
REQUIRED_PIPELINE_ARGUMENTS = ("prompt", "num_inference_steps", "generator", "output_type")

# Name of the hook of enable_group_offload().
GROUP_OFFLOADING = "group_offloading"

# The code that all functions share which are decorated with one of torch's context managers.
TORCH_DECORATOR = torch.no_grad()(lambda: None).__code__


def check_call(pipeline: DiffusionPipeline, config: DDPOConfig) -> None:
    """Raise a `ValueError` if a pipeline can't be called with the config's arguments, or can't be replayed."""
    name = type(pipeline).__name__
    parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
    del parameters["self"]
    if missing := [argument for argument in REQUIRED_PIPELINE_ARGUMENTS if argument not in parameters]:
        raise ValueError(
            f"pipeline is a {name}, whose __call__ takes no {', '.join(missing)}; the trainer needs a pipeline that "
            "makes images or videos from prompts."
        )
    _check_parts(pipeline, config)
    if config.guidance_scale is not None and "guidance_scale" not in parameters:
        raise ValueError(
            f"guidance_scale is {config.guidance_scale}, but the __call__ of {name} takes none. Set "
            "guidance_scale=None."
        )
    for field, names in (("pipeline_kwargs", config.pipeline_kwargs), ("pipeline_inputs", config.pipeline_inputs)):
        if unknown := [argument for argument in names or () if argument not in parameters]:
            raise ValueError(
                f"{field} holds {', '.join(unknown)}, which the __call__ of {name} does not take. It takes "
                f"{', '.join(parameters)}."
            )
    assert not isinstance(config.pipeline_kwargs, str), "DDPOConfig parses strings"
    for argument, value in (config.pipeline_kwargs or {}).items():
        if isinstance(value, list | tuple) and argument.startswith(PER_SAMPLE_PREFIXES):
            raise ValueError(
                f"pipeline_kwargs holds a list for {argument}, but batches are made of other samples in training than "
                f"in sampling. Give one text for all, or name {argument} in pipeline_inputs and return it with the "
                "metadata of each prompt."
            )
    given = {*OWN_PIPELINE_ARGUMENTS, *(config.pipeline_kwargs or ()), *(config.pipeline_inputs or ())}
    if lacking := [argument for argument in parameters if is_required(parameters[argument]) and argument not in given]:
        raise ValueError(
            f"The __call__ of {name} needs {', '.join(lacking)}: name it in pipeline_inputs and return it with the "
            "metadata of each prompt, or give it in pipeline_kwargs if it is the same for all."
        )


def is_required(parameter: inspect.Parameter) -> bool:
    """Return whether a call fails without the parameter."""
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def _check_parts(pipeline: DiffusionPipeline, config: DDPOConfig) -> None:
    name = type(pipeline).__name__
    if "scheduler" not in pipeline.components:
        raise ValueError(f"pipeline is a {name} without a component named scheduler, whose steps could be a policy.")
    if not any("prepare_latents" in dir(part) for part in (pipeline, *parts(pipeline).values())):
        raise ValueError(
            f"pipeline is a {name} without a method prepare_latents, by which the state of a replayed step is passed."
        )
    denoiser = pipeline.components[denoiser_name(pipeline)]
    if isinstance(denoiser, CacheMixin) and denoiser.is_cache_enabled:
        raise ValueError(
            f"The denoiser of {name} reuses what it computed in earlier steps, which a single replayed step can't. "
            "Switch it off with `disable_cache()`."
        )
    _check_offloading(pipeline, denoiser)
    if config.offload_vae and ("vae" not in pipeline.components or config.pipeline_inputs):
        reason = "encodes images in training too" if config.pipeline_inputs else "has no component named vae"
        raise ValueError(f"offload_vae is True, but {name} {reason}. Set it to False.")
    for option, attribute in (("vae_slicing", "use_slicing"), ("vae_tiling", "use_tiling")):
        vae = pipeline.components.get("vae")
        if vars(config)[option] and (not isinstance(vae, AutoencoderMixin) or attribute not in vars(vae)):
            what = "has none" if vae is None else f"has {type(vae).__name__}, which can't"
            raise ValueError(f"{option} is True, but as its vae {name} {what}. Set it to False.")
    if config.offload_text_encoders and "encode_prompt" not in dir(pipeline):
        raise ValueError(
            f"offload_text_encoders is True, but {name} has no method encode_prompt whose results could be kept. Set "
            "it to False."
        )


def _check_offloading(pipeline: DiffusionPipeline, denoiser: nn.Module) -> None:
    for component_name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and "_hf_hook" in vars(component):
            raise ValueError(
                f"pipeline.{component_name} is offloaded by accelerate's hooks, which would move it away between two "
                "steps of training. Call `pipeline.remove_all_hooks()`, and set offload_text_encoders or offload_vae."
            )
    for module in denoiser.modules():
        if "_diffusers_hook" not in vars(module):
            continue
        if HookRegistry.check_if_exists_or_initialize(module).get_hook(GROUP_OFFLOADING) is not None:
            raise ValueError(
                f"The denoiser of {type(pipeline).__name__} is offloaded in groups of layers, which would move "
                "trained weights away between two steps of training. Load it without enable_group_offload(); text "
                "encoders and vae may be offloaded so. To save memory, load it quantized, or set "
                "gradient_checkpointing=True."
            )


def ingredients(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """
    Describe what a pipeline's images depend on, apart from the weights that are trained and from settings, by name and
    in JSON's types: its class, the config of its scheduler, the frozen weights of its networks.
    """
    scheduler = pipeline.components["scheduler"]
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {
        "pipeline": type(pipeline).__name__,
        "pipeline.scheduler": type(scheduler).__name__,
        **{f"pipeline.scheduler.{name}": described(value) for name, value in config.items()},
        **{
            f"pipeline.{name}": f"{type(component).__name__} with the weights' hash {frozen_weights_hash(component)}"
            for name, component in pipeline.components.items()
            if isinstance(component, nn.Module)
        },
    }


def frozen_weights_hash(network: nn.Module) -> str:
    """Return a hash of the first numbers of each tensor that is not trained: all of them would take minutes."""
    numbers = [torch.zeros(0)]
    for parameter in network.parameters():
        if parameter.requires_grad or parameter.is_meta:
            continue
        for row in plain_tensors(parameter.detach()):
            while row.ndim > 1:
                row = row[0]
            numbers.append(row.reshape(-1)[:8].to("cpu", torch.float32))
    return digest(torch.cat(numbers))[:DIGITS]


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Return the tensors that a quantized weight of torchao or quanto consists of; any other tensor as it is."""
    if "__tensor_flatten__" not in dir(tensor):  # PyTorch's protocol of tensors that wrap others
        yield tensor
        return
    names, _ = attrgetter("__tensor_flatten__")(tensor)()
    for name in names:
        yield from plain_tensors(attrgetter(name)(tensor))


def makes_video(pipeline: DiffusionPipeline) -> bool:
    """Return whether a pipeline's output has frames."""
    return bool({"num_frames", "video_length"} & inspect.signature(type(pipeline).__call__).parameters.keys())


def move(pipeline: DiffusionPipeline, device: torch.device, config: DDPOConfig) -> None:
    """Move a pipeline to a device, except the components that wait in CPU memory."""
    if not (config.offload_text_encoders or config.offload_vae):
        pipeline.to(device)  # knows what must not be moved, such as quantized networks
        return
    waiting = {*(text_encoders(pipeline) if config.offload_text_encoders else ()), *(["vae"] * config.offload_vae)}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in waiting:
            component.to(device)


def with_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function without torch's `no_grad`, wherever it is among its decorators; the others stay."""
    if not isinstance(function, FunctionType) or "__wrapped__" not in vars(function):
        return function
    wrapped = vars(function)["__wrapped__"]
    inner = with_grad(wrapped)
    cells = function.__closure__ or ()
    if function.__code__ is TORCH_DECORATOR and any(is_no_grad(cell.cell_contents) for cell in cells):
        return inner
    if inner is wrapped:
        return function
    closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in cells)
    rebuilt = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(rebuilt, inner)


def is_no_grad(factory: Any) -> bool:
    """Return whether a context manager that torch decorates with switches gradients off."""
    return isinstance(factory, MethodType) and isinstance(factory.__self__, torch.no_grad | torch.inference_mode)


def quiet_copy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a shallow copy that shares all components, without progress bars, also in its parts."""
    twin = copy.copy(pipeline)
    vars(twin).update({name: quiet_copy(part) for name, part in parts(pipeline).items()})
    twin.set_progress_bar_config(disable=True)
    return twin


def parts(pipeline: DiffusionPipeline) -> dict[str, DiffusionPipeline]:
    """Return the pipelines that a combined pipeline consists of, such as Kandinsky's prior and decoder."""
    return {name: part for name, part in vars(pipeline).items() if isinstance(part, DiffusionPipeline)}


def policy_copy(
    pipeline: DiffusionPipeline, denoiser: str, scheduler: PolicyScheduler, offload: bool
) -> DiffusionPipeline:
    """
    Return a shallow copy of a pipeline that steps as a policy.

    `scheduler` becomes the scheduler of the copy and of the part that has the component named `denoiser`. With
    `offload`, text encoders stay off the GPU while they have nothing to encode.
    """
    twin: Any = quiet_copy(pipeline)
    twin.scheduler = scheduler
    twin.__class__ = policy_pipeline_class(type(pipeline), denoiser)
    for name, part in parts(pipeline).items():
        if part.components.get(denoiser) is pipeline.components[denoiser]:
            vars(twin)[name] = policy_copy(part, denoiser, scheduler, offload)
    if "encode_prompt" in dir(twin):
        twin.encode_prompt = PromptEncoder(twin, offload)
    if "prepare_latents" in dir(twin):
        twin.prepare_latents = starting_from_state(twin.prepare_latents, scheduler)
    if "requires_safety_checker" in inspect.signature(type(pipeline).__init__).parameters:
        # It would blacken images before they are scored. Pipelines without that switch (Cosmos) insist on theirs.
        twin.safety_checker = None
    return twin


def with_component(pipeline: DiffusionPipeline, name: str, component: nn.Module) -> DiffusionPipeline:
    """Return a shallow copy with another component of that name, also in its parts."""
    twin = copy.copy(pipeline)
    for part_name, part in parts(pipeline).items():
        if part.components.get(name) is pipeline.components[name]:
            vars(twin)[part_name] = with_component(part, name, component)
    twin.register_modules(**{name: component})
    return twin


def moving_to_decode(autoencoder: nn.Module, denoiser: nn.Module) -> nn.Module:
    """
    Return an autoencoder that shares all weights, and moves to the denoiser's device when it is asked to decode: it is
    not there during the denoising steps.
    """
    twin: Any = copy.copy(autoencoder)
    decode = twin.decode

    @functools.wraps(decode)
    def move_and_decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = next(denoiser.parameters()).device
        autoencoder.to(device)
        return decode(latents.to(device), *args, **kwargs)

    twin.decode = move_and_decode
    return twin


def policy_pipeline_class(pipeline_class: type[DiffusionPipeline], denoiser: str) -> type[DiffusionPipeline]:
    """
    Return a subclass without the `torch.no_grad()` of `__call__`, also of those that it calls by `super()`.

    It runs on the device of its denoiser. diffusers walks through all modules of all networks for that, several times
    in a call: 4 ms per replayed step of the embedded pipeline, most of the time that is spent outside the denoiser.
    """
    parents = [
        type(parent.__name__, (parent,), {"__call__": with_grad(vars(parent)["__call__"])})
        for parent in pipeline_class.__mro__[1:]
        if "__call__" in vars(parent) and with_grad(vars(parent)["__call__"]) is not vars(parent)["__call__"]
    ]
    own = {
        "__call__": with_grad(pipeline_class.__call__),
        "_execution_device": property(lambda self: next(vars(self)[denoiser].parameters()).device),
    }
    return type(pipeline_class.__name__, (pipeline_class, *parents), own)


def starting_from_state(prepare_latents: Callable[..., Any], scheduler: PolicyScheduler) -> Callable[..., Any]:
    """
    Return a pipeline's `prepare_latents` that gives the state to replay instead of the first latents.

    (The argument `latents` of `__call__` does not serve: FLUX.2 packs it once more, image-to-image has none.)
    """

    @functools.wraps(prepare_latents)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            prepared = prepare_latents(*args, **kwargs)
        latents, *others = prepared if isinstance(prepared, tuple) else (prepared,)
        latents = scheduler.first_latents(latents)
        return (latents, *others) if isinstance(prepared, tuple) else latents

    return prepare
