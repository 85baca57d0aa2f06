"""Results, decisions and sharded weights (FSDP2) that the processes of a run share."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import DynamoBackend, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the `(N, ...)` values of all processes, in their order, on the CPU: `(N · processes, ...)`."""
    if accelerator.num_processes == 1:
        return values.cpu()
    if values.dtype != torch.float64:
        return accelerator.gather(values.to(accelerator.device)).cpu()
    bits = values.view(torch.int64)  # not every device has float64
    return accelerator.gather(bits.to(accelerator.device)).cpu().view(torch.float64)


def first_reason(own: str | None) -> str | None:
    """
    Return the first reason that any process has for or against something, so that all decide alike; `None` if none has
    one. Of several processes it names the one that it comes from. All processes have to call it.
    """
    if PartialState().num_processes == 1:
        return own
    reasons = enumerate(gather_object([own]))
    return next((f"on process {rank} {reason}" for rank, reason in reasons if reason is not None), None)


def smallest(own: int) -> int:
    """Return the smallest value that any process has. All processes have to call it."""
    return own if PartialState().num_processes == 1 else min(gather_object([own]))


def note_process(error: BaseException) -> None:
    """Add to an error the process that raised it: the others stop with an error about the connection."""
    if (count := PartialState().num_processes) > 1:
        error.add_note(f"Raised on process {PartialState().process_index} of {count}.")


def check_alike(values: Mapping[str, Any]) -> None:
    """
    Refuse processes that were given different values. What JSON does not know is not compared. All processes have to
    call it.

    Raises:
        `ValueError`: On all processes, with the name and both values.
    """
    if PartialState().num_processes == 1:
        return
    first, *others = gather_object([{name: as_json(value) for name, value in values.items()}])
    for rank, other in enumerate(others, start=1):
        if names := [name for name in first if first[name] != other.get(name)]:
            raise ValueError(
                f"{names[0]} is {first[names[0]]} on process 0 and {other.get(names[0])} on process {rank}; give all "
                "processes of a run the same."
            )


def as_json(value: Any) -> str:
    """Return a value as text that is the same in another process; an empty text if JSON does not know it."""
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError:
        return ""


def check_devices(config: Any) -> None:
    """Raise a `ValueError` for several GPUs in one process."""
    if config.n_gpu > 1:
        raise ValueError(
            f"{config.n_gpu} GPUs are visible to one process, and DataParallel can't drive a pipeline. Start the "
            "script with `accelerate launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )


def check_compilation(accelerator: Accelerator, torch_compile: bool) -> None:
    """
    Keep accelerate from compiling the policy, which runs a whole pipeline. `torch_compile` has compiled the denoiser.

    Raises:
        `ValueError`: If only accelerate's own config asks for it.
    """
    dynamo = accelerator.state.dynamo_plugin
    if dynamo.backend != DynamoBackend.NO and not torch_compile:
        raise ValueError(
            f"accelerate's dynamo_backend is {dynamo.backend.value}, which would compile a call of the pipeline. "
            "Leave it out, and set torch_compile=True, which compiles the denoiser."
        )
    dynamo.backend = DynamoBackend.NO


def check_wrapping(accelerator: Accelerator) -> None:
    """
    Refuse ways to wrap the policy under which a replayed step would differ from the sampled one.

    Raises:
        `ValueError`: With the setting, its value and the remedy.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            f"fsdp_version is {accelerator.state.fsdp_plugin.fsdp_version}, which flattens frozen and trained weights "
            "together. Set `fsdp_version: 2`, as in examples/accelerate_configs/fsdp2.yaml."
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    stage = accelerator.state.deepspeed_plugin.zero_stage
    if stage > 2:
        raise ValueError(
            f"zero_stage is {stage}, which divides the denoiser's weights in a way that sampling can't undo. Set "
            "it to 2, or use FSDP2 (examples/accelerate_configs/fsdp2.yaml), which divides them too."
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"{accelerator.mixed_precision}=True is set with DeepSpeed, which would train a LoRA adapter in that "
            "precision too and round recorded states. Leave it out, and load the pipeline in half precision "
            "(torch_dtype=torch.bfloat16): the adapter stays float32."
        )


def is_sharded(module: nn.Module) -> bool:
    """Return whether each process holds a part of the weights only, so that running the module takes all of them."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with their shards put together. Where there are shards, all processes have to call it."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}


def sharded_like(weights: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard whole weights as those of the same name in `model` are. All processes have to call it."""
    return {
        name: distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        if isinstance(like := model[name], DTensor)
        else value
        for name, value in weights.items()
    }


def on_any_process(accelerator: Accelerator, flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on at least one process. All processes have to call it."""
    return gather(accelerator, torch.tensor([flags], dtype=torch.uint8)).bool().any(dim=0).tolist()
