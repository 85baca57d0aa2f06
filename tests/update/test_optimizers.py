"""An optimizer that is given holds what is trained; one that goes on takes over what was changed, and no more."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.optim.lr_scheduler import StepLR
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer


PROMPTS = ["cat", "dog"]
SHORT = {
    "save_strategy": "epoch", "one_pass": None, "num_inference_steps": 2, "num_sample_batches": 1,
    "per_device_sample_batch_size": 2, "per_device_train_batch_size": 2,
}  # fmt: skip


def trainer_of(config: Any, **kwargs: Any) -> DDPOTrainer:
    return DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), **kwargs)


def weights(trainer: DDPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def learning_rates(trainer: DDPOTrainer) -> list[float]:
    return [log["learning_rate"] for log in trainer.state.log_history if "reward" in log]


# ---- Given ----


def test_an_optimizer_that_leaves_out_trained_weights_is_refused_at_construction(make_config):
    before = tiny_pipeline()
    optimizer = torch.optim.AdamW(before.unet.parameters())  # the adapter is added only then
    with pytest.raises(ValueError, match=r"optimizers holds AdamW without (\d+) of the \1 trained.*optimizer_cls_and"):
        DDPOTrainer(make_config(), brightness, PROMPTS, before, optimizers=(optimizer, None))
    pipeline = with_adapter()
    some = [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad][1:]
    with pytest.raises(ValueError, match="optimizers holds SGD without 1 of the"):
        DDPOTrainer(make_config(), brightness, PROMPTS, pipeline, optimizers=(torch.optim.SGD(some), None))


def with_adapter() -> Any:
    pipeline = tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return pipeline


def test_an_optimizer_or_its_class_trains(make_config):
    pipeline = with_adapter()
    given = torch.optim.SGD([p for p in pipeline.unet.parameters() if p.requires_grad], lr=0.5)
    config = make_config(**{**SHORT, "save_strategy": "no"})
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline, optimizers=(given, None))
    before = weights(trainer).clone()
    trainer.train()
    assert not torch.equal(weights(trainer), before) and learning_rates(trainer) == [0.5]
    by_class = trainer_of(config, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.25}))
    by_class.train()
    assert learning_rates(by_class) == [0.25]


# ---- Going on ----

SGD = {**SHORT, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}


def went_on(make_config, folder: Path, before: dict[str, Any], after: dict[str, Any], **kwargs: Any) -> DDPOTrainer:
    """A second round with other settings."""
    config = make_config(**{"output_dir": str(folder), "num_train_epochs": 2, **before})
    first = trainer_of(config, **kwargs)
    first.add_callback(StopAfterTheFirst())
    first.train()
    trainer = trainer_of(
        make_config(**{"output_dir": str(folder), "num_train_epochs": 2, **before, **after}), **kwargs
    )
    trainer.train(resume_from_checkpoint=True)
    return trainer


class StopAfterTheFirst(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_changed_learning_rate_and_weight_decay_take_effect(make_config, tmp_path, caplog):
    """With plain gradient descent the second step is −rate · (gradient + decay · weight), from the same weights."""
    same = went_on(make_config, tmp_path / "same", SGD, {})
    start = trainer_of(make_config(**SGD, num_train_epochs=1, output_dir=str(tmp_path / "start")))
    start.train()
    gradient = (weights(start) - weights(same)) / 1e-2
    with caplog.at_level(logging.WARNING, logger="ddpo_trl"):
        other = went_on(make_config, tmp_path / "other", SGD, {"learning_rate": 0.3, "weight_decay": 0.5})
    expected = weights(start) - 0.3 * (gradient + 0.5 * weights(start))
    assert gradient.abs().max() > 0
    assert torch.allclose(weights(other), expected, atol=1e-5)
    assert learning_rates(other) == [1e-2, 0.3]
    said = "\n".join(record.getMessage() for record in caplog.records)
    for name in ("learning_rate is 0.3 and was 0.01", "weight_decay is 0.5 and was 0.0"):
        assert f"{name}: from here on this is another run" in said


def test_a_changed_rate_follows_the_schedule_from_where_it_stands(make_config, tmp_path):
    """Linear from the rate down to 0 in two rounds: the second has half of it. Four rounds: three quarters."""
    linear = {**SHORT, "lr_scheduler_type": "linear"}
    assert learning_rates(went_on(make_config, tmp_path / "a", linear, {"learning_rate": 0.1})) == [1e-2, 0.05]
    longer = went_on(make_config, tmp_path / "b", linear, {"num_train_epochs": 4})
    assert learning_rates(longer) == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_a_changed_rate_takes_effect_under_a_schedule_that_goes_by_the_evaluation(make_config, tmp_path):
    plateau = {
        **SHORT, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch",
        "metric_for_best_model": "eval_reward",
    }  # fmt: skip
    trainer = went_on(make_config, tmp_path, plateau, {"learning_rate": 0.1}, eval_prompts=["cat"])
    assert learning_rates(trainer) == [1e-2, 0.1]


def test_changed_momenta_take_effect_and_the_state_goes_on(make_config, tmp_path):
    trainer = went_on(make_config, tmp_path, SHORT, {"adam_beta1": 0.5, "adam_epsilon": 1e-6})
    for group in trainer.optimizer.param_groups:
        assert group["betas"] == (0.5, 0.999) and group["eps"] == 1e-6
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}


class Decay(TrainerCallback):
    """A schedule of the user's own."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["weight_decay"] += 0.25


def test_what_a_callback_has_moved_stays_where_nothing_was_changed(make_config, tmp_path):
    trainer = went_on(make_config, tmp_path, SHORT, {"learning_rate": 0.1}, callbacks=[Decay()])
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5001, 0.5]


def test_an_optimizer_of_the_users_is_compared_and_its_own_schedule_goes_on(make_config, tmp_path, caplog):
    def run(rate: float, rounds: int) -> DDPOTrainer:
        pipeline = with_adapter()
        optimizer = torch.optim.SGD([p for p in pipeline.unet.parameters() if p.requires_grad], lr=rate)
        halving = StepLR(optimizer, step_size=1, gamma=0.5)
        config = make_config(**SHORT, num_train_epochs=rounds, learning_rate=rate)
        return DDPOTrainer(config, brightness, PROMPTS, pipeline, optimizers=(optimizer, halving))

    run(0.5, 1).train()
    with caplog.at_level(logging.WARNING, logger="ddpo_trl"):
        resumed = run(1.0, 3)
        resumed.train(resume_from_checkpoint=True)
    assert learning_rates(resumed) == [0.5, 0.5, 0.25]  # of 1.0: half, a quarter
    said = [record.getMessage() for record in caplog.records if "Resuming" in record.getMessage()]
    assert len(said) == 1 and "initial_lr of the optimizer's group 0 is 1.0 and was 0.5" in said[0]


def test_another_optimizer_or_kind_of_schedule_is_refused(make_config, tmp_path):
    default = make_config().optim.value  # fused from torch 2.8 on
    with pytest.raises(ValueError, match=f"optim is 'sgd', but the checkpoint was written with '{default}'.*Set"):
        went_on(make_config, tmp_path / "a", SHORT, {"optim": "sgd"})
    by_class = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    trainer_of(make_config(output_dir=str(tmp_path / "b"), **SHORT)).train()
    trainer = trainer_of(make_config(output_dir=str(tmp_path / "b"), num_train_epochs=2, **SHORT), **by_class)
    with pytest.raises(
        ValueError, match="the optimizer is SGD, which can't go on with the state of .* AdamW. Use AdamW"
    ):
        trainer.train(resume_from_checkpoint=True)
