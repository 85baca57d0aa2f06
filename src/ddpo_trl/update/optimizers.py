"""Optimizers: checks of the user's, and resuming from a checkpoint with hyperparameters that have changed since."""

import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau


BY_CLASS = "give its class, or a function of parameters, by optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-3})"


def check_given(optimizers: Any, policy: nn.Module, evaluates: bool) -> None:
    """
    Refuse an optimizer that would leave weights untrained, or a schedule that would never act.

    Args:
        optimizers (`Any`):
            Argument of the trainer; should be a pair of an optimizer and its schedule, each of which may be `None`.
        policy (`torch.nn.Module`):
            Policy with the weights to train.
        evaluates (`bool`):
            Whether the run is evaluated.

    Raises:
        `TypeError`: If it is not such a pair.
        `ValueError`: If the optimizer lacks weights to train, or the schedule belongs to another optimizer or waits
            for evaluations that never happen.
    """
    if not (isinstance(optimizers, tuple | list) and len(optimizers) == 2):
        raise TypeError(f"optimizers is {type(optimizers).__name__}; give a pair (optimizer, lr_scheduler or None).")
    optimizer, scheduler = optimizers
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(f"optimizers[0] is {optimizer!r}, which is not an optimizer. To have one made, {BY_CLASS}.")
    if not isinstance(scheduler, LRScheduler | None):
        raise TypeError(
            f"optimizers[1] is {scheduler!r}, which is not a schedule of a learning rate. Give one that was "
            "made for optimizers[0], or set lr_scheduler_type."
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError(
            "optimizers[1] is the schedule of another optimizer than optimizers[0], whose learning rate would never "
            "change. Make it for optimizers[0], or set lr_scheduler_type."
        )
    if isinstance(scheduler, ReduceLROnPlateau) and not evaluates:
        raise ValueError(
            "optimizers[1] is ReduceLROnPlateau, which acts after evaluations only. Set eval_strategy='epoch', give "
            "eval_prompts, and choose the figure by metric_for_best_model."
        )
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    missing = sum(id(parameter) not in held for parameter in trained)
    if missing:
        raise ValueError(
            f"optimizers holds {type(optimizer).__name__} without {missing} of the {len(trained)} trained weights, "
            "which it would leave as they are. Add the adapter to the pipeline first and give the optimizer its "
            f"weights (those with requires_grad), or {BY_CLASS}, or set optim."
        )


def as_factory(given: tuple[Any, dict[str, Any]] | None) -> tuple[Any, dict[str, Any]] | None:
    """Return `optimizer_cls_and_kwargs` for Trainer, which takes classes, and factories of functions of a model."""
    if given is None or not isinstance(given[0], types.FunctionType):
        return given
    function, kwargs = given

    def of_model(model: nn.Module, **options: Any) -> Optimizer:
        made: Optimizer = function([each for each in model.parameters() if each.requires_grad], **options)
        return made

    return (lambda: of_model), kwargs


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Hyperparameters of each group, with the initial (`initial_lr`) instead of the current learning rate."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def as_json(value: Any) -> Any:
    """Return a hyperparameter as it is read back from JSON."""
    if isinstance(value, Tensor):
        return value.item()
    return json.loads(json.dumps(value, default=str))


def record(optimizer: Optimizer, scheduler: LRScheduler, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe the optimizer for `run.json`; `groups` are the [`hyperparameters`] at the start."""
    own = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return {
        "optimizer": type(own).__name__,
        "lr_scheduler": type(scheduler).__name__,
        "groups": [{name: as_json(value) for name, value in group.items()} for group in groups],
    }


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if the class of the optimizer or of its schedule has changed since [`record`]."""
    for name, argument in (("optimizer", "optimizers"), ("lr_scheduler", "lr_scheduler_type")):
        if saved[name] != current[name]:
            raise ValueError(
                f"{argument}: the {name} is {current[name]}, which can't go on with the state of the checkpoint's "
                f"{saved[name]}. Use {saved[name]} to resume, or begin another run from the checkpoint's weights."
            )


def keep_changed(
    optimizer: Optimizer,
    scheduler: LRScheduler,
    groups: Sequence[dict[str, Any]],
    saved: Sequence[Mapping[str, Any]],
) -> list[str]:
    """
    Set the hyperparameters that the user has changed since a checkpoint that was just loaded.

    Args:
        optimizer ([`~torch.optim.Optimizer`]), scheduler ([`~torch.optim.lr_scheduler.LRScheduler`]):
            Both with the checkpoint's state.
        groups (`Sequence[dict]`):
            [`hyperparameters`] before loading.
        saved (`Sequence[Mapping]`):
            Those of the run that wrote the checkpoint, from its `run.json`. What is equal there keeps the checkpoint's
            value: a callback may have moved it.

    Returns:
        `list[str]`: A sentence for each change.
    """
    changed = []
    rates = [as_json(group["lr"]) for group in optimizer.param_groups]
    for index, (group, own, before) in enumerate(zip(optimizer.param_groups, groups, saved, strict=True)):
        for name in own.keys() & before.keys():
            if as_json(own[name]) == before[name]:
                continue
            changed.append(f"{name} of the optimizer's group {index} is {own[name]} and was {before[name]}.")
            if name == "initial_lr" and before[name]:
                rates[index] *= own[name] / before[name]
            group[name] = own[name]
    if isinstance(scheduler, LambdaLR):  # all of transformers' that depend on the step only
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        rates = [
            as_json(base * factor(scheduler.last_epoch))
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    set_rates(optimizer, scheduler, rates)
    return sorted(changed)


def set_rates(optimizer: Optimizer, scheduler: LRScheduler, rates: Sequence[float]) -> None:
    """Set the learning rates of the next step; nothing is written if they are unchanged."""
    if [as_json(group["lr"]) for group in optimizer.param_groups] == list(rates):
        return
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler.get_last_lr()[:] = rates  # what is logged
