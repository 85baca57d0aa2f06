"""The on-policy guard: a policy that is not the one that sampled stops the run, and the sentence names the fault."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import TrainerCallback

from conformance.image_pipelines import IMAGE_CASES
from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer, check_pipeline
from ddpo_trl.checks import replay_problem
from ddpo_trl.checks.causes import CAUSES
from ddpo_trl.checks.mismatch import FLOAT32_TOLERANCE
from ddpo_trl.policy.schedulers import Sampling


PROMPTS = ["cat", "dog", "owl"]
CASES = {case.name: case for case in IMAGE_CASES}
OPENING = r"another log-probability in training than in sampling: they differ by \S+ per latent .*"

Plant = Callable[[DDPOTrainer], Any]


@pytest.fixture
def one_pass() -> bool:
    """Replay is the second pass's."""
    return False


class BetweenSamplingAndTraining(TrainerCallback):
    """Does something when the rollout of the round is there and the first update is not."""

    def __init__(self, plant: Plant):
        self.plant = plant
        self.trainer: DDPOTrainer
        self.done = False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.done:
            self.plant(self.trainer)
        self.done = True


def make_trainer(config, plant: Plant = id, pipeline=None, trainer_class=DDPOTrainer, **kwargs) -> DDPOTrainer:
    callback = BetweenSamplingAndTraining(plant)
    pipeline = pipeline or tiny_pipeline()
    trainer = trainer_class(config, brightness, PROMPTS, pipeline, callbacks=[callback], **kwargs)
    callback.trainer = trainer
    with torch.no_grad():  # an adapter starts as the identity, and to switch it off would change nothing
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return trainer


def deviations(trainer: DDPOTrainer) -> list[float]:
    return [log["val/ratio_deviation"] for log in trainer.state.log_history if "reward" in log]


# ---- Health ----


@pytest.mark.parametrize("settings", [{}, {"loss_type": "sf"}, {"bf16": True}, {"log_prob_reduction": "sum"}])
def test_a_healthy_run_has_no_deviation_in_any_round(make_config, settings):
    trainer = make_trainer(make_config(num_train_epochs=2, **settings))
    trainer.train()
    assert deviations(trainer) == [0.0, 0.0]


def test_a_healthy_run_is_replayed_no_more_often_than_it_is_trained(make_config):
    pipeline, calls = tiny_pipeline(), []
    trainer = make_trainer(make_config(), pipeline=pipeline)
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2 * 4 + 2 * 4  # batches and micro-batches x steps


def off_by(difference: float, sample_too: bool) -> Callable[..., Any]:
    """A prediction that is off by a number in training, as other kernels may make it; or at the batch size of 1."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        is_training = torch.is_grad_enabled() or (sample_too and len(inputs[0]) < 8)
        return (output[0] + difference * is_training,)

    return hook


@pytest.mark.parametrize("half", ["bf16", "pipeline"])
def test_in_half_precision_and_with_unequal_batch_sizes_clipping_starts_from_ratio_one(make_config, half):
    """The recorded log-probabilities are off, so the first update takes the old ones from its own pass."""
    pipeline = tiny_pipeline().to(torch.bfloat16 if half == "pipeline" else torch.float32)
    config = make_config(bf16=half == "bf16", per_device_train_batch_size=1, cliprange=1e-7)
    trainer = make_trainer(config, pipeline=pipeline)
    pipeline.unet.register_forward_hook(off_by(0.004, sample_too=True))  # guided: less than 4 samples
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "reward" in log]
    assert 1e-3 < log["val/ratio_deviation"] < 0.1
    assert log["val/ratio"] == 1.0
    assert log["policy/clipfrac_avg"] == 0.0
    assert log["policy/approxkl_avg"] == 0.0


# ---- Faults ----


def turn_on_dropout(trainer: DDPOTrainer) -> None:
    vars(trainer._policy)["train"] = trainer._policy.denoiser.train  # which the Trainer calls before each loss


def switch_to_training_at_each_call(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.register_forward_pre_hook(lambda module, _: module.train() and None)


def change_guidance(trainer: DDPOTrainer) -> None:
    trainer.args.guidance_scale = 7.0


def change_option(trainer: DDPOTrainer) -> None:
    trainer._policy.runner.pipeline_kwargs["guidance_rescale"] = 1.0


def change_noise(trainer: DDPOTrainer) -> None:
    trainer._policy.scheduler.eta = 0.5


def change_weights(trainer: DDPOTrainer) -> None:
    for name, parameter in trainer._policy.named_parameters():
        if "down_blocks" in name and "lora_B" in name:
            parameter.data.mul_(3)


def switch_adapter_off(trainer: DDPOTrainer) -> None:
    for module in trainer._policy.denoiser.modules():
        if "lora_B" in dict(module.named_children()):
            module._disable_adapters = True


def scale_adapter(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.set_adapters(["default"], [5.0])


def mix_samples(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.register_forward_hook(lambda m, i, output: (output[0] + output[0].mean(0),))


def react_to_batch_size(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.register_forward_hook(lambda m, i, output: (output[0] + 0.5 / len(output[0]),))


def draw_in_a_hook(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.register_forward_hook(lambda m, i, output: (output[0] + torch.randn_like(output[0]),))


def draw_elsewhere(trainer: DDPOTrainer) -> None:
    module = trainer._policy.denoiser.conv_in
    forward = module.forward
    module.forward = lambda x: forward(x) + torch.randn(())


def count_calls(trainer: DDPOTrainer) -> None:
    module, count = trainer._policy.denoiser.conv_in, itertools.count(1)
    forward = module.forward
    module.forward = lambda x: forward(x) + 0.1 * next(count)


def act_with_gradients(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.register_forward_hook(off_by(0.5, sample_too=False))


def disturb_once(trainer: DDPOTrainer) -> None:
    first = iter([1.0])
    trainer._policy.denoiser.register_forward_hook(lambda m, i, output: (output[0] + next(first, 0.0),))


@pytest.mark.parametrize(
    ("plant", "cause"),
    [
        (turn_on_dropout, r"The step is random: .*dropout \(unet in training mode\)"),
        (switch_to_training_at_each_call, r"The step is random: .*dropout \(unet in training mode\)"),
        (change_guidance, r"Changed since sampling: guidance_scale was 30\.0 and is 7\.0\. "),
        (change_option, r"Changed since sampling: pipeline_kwargs\['guidance_rescale'\] was 0\.1 and is 1\.0\. "),
        (change_noise, r"Changed since sampling: scheduler\.eta was 1\.0 and is 0\.5\. "),
        (change_weights, r"Changed since sampling: 8 of the 16 trained weights have new .*\(down_blocks\.\S+lora_B"),
        (switch_adapter_off, r"Changed since sampling: 8 of the adapter's 8 layers were switched, merged or scaled\."),
        (scale_adapter, r"Changed since sampling: 8 of the adapter's 8 layers were switched, merged or scaled\."),
        (draw_in_a_hook, r"The step is random: .*dropout, a forward hook that draws random numbers"),
        (draw_elsewhere, r"The step is random: .*torch's global generator"),
        (count_calls, r"The step is random: .*counts its calls"),
        (act_with_gradients, r"The cause is the computation with gradients enabled"),
        (disturb_once, r"The difference is not reproducible: it vanished when"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_what_comes_between_sampling_and_training_is_named(make_config, plant, cause):
    config = make_config(pipeline_kwargs={"guidance_rescale": 0.1}, guidance_scale=30.0)
    with pytest.raises(RuntimeError, match=OPENING + cause):
        make_trainer(config, plant, pipeline=with_dropout()).train()


def with_dropout() -> StableDiffusionPipeline:
    """Its denoiser's own dropout: an adapter's is taken out at construction."""
    pipeline = tiny_pipeline()
    for module in pipeline.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return pipeline


@pytest.mark.parametrize(
    ("plant", "settings", "cause"),
    [
        (
            react_to_batch_size,
            {"per_device_train_batch_size": 2},
            r"The cause is the micro-batch: .*\(2 samples in training, 4 in sampling\)\. Set .* to the same value",
        ),
        (
            mix_samples,
            {"per_device_train_batch_size": 1},
            r"The cause is the micro-batch: .*or to 1 if the samples of a batch influence each other",
        ),
        (
            mix_samples,
            {"per_device_train_batch_size": 4},
            r"The cause is the micro-batch: .*the result of a sample depends on the other samples\. Set .* to 1",
        ),
    ],
    ids=["other size", "mixed, other size", "mixed, same size"],
)
def test_an_effect_of_the_micro_batch_is_named(make_config, plant, settings, cause):
    trainer = make_trainer(make_config(**settings))
    plant(trainer)  # in sampling too
    with pytest.raises(RuntimeError, match=OPENING + cause):
        trainer.train()


# ---- Honesty ----


def change_a_frozen_weight(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.conv_out.bias.data.add_(0.5)


NOT_FOUND = (
    "The cause was not found. Ruled out: randomness, gradients, batch size, changed settings, trained weights or "
    "adapter. Look for a callback that changes frozen weights, prompt embeddings or autocast"
)


def exchange_embeddings(trainer: DDPOTrainer) -> None:
    encoder = trainer._policy.runner.policy_pipeline.encode_prompt
    entries = encoder._cache._entries
    entries.update(zip(list(entries), list(entries.values())[::-1], strict=True))
    encoder._present.clear()


@pytest.mark.parametrize("plant", [change_a_frozen_weight, exchange_embeddings])
def test_a_change_that_is_not_recorded_is_not_taken_for_another_cause(make_config, plant):
    with pytest.raises(RuntimeError, match=OPENING + re.escape(NOT_FOUND)):
        make_trainer(make_config(), plant).train()


class OtherAutocast(DDPOTrainer):
    """A trainer whose author put autocast around the loss."""

    def compute_loss(self, *args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().compute_loss(*args, **kwargs)


def sensitive_pipeline():
    """One whose predictions are large, so that rounding them moves log-probabilities by more than the tolerance."""
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(20)
    return pipeline


def round_transitions_in_sampling(trainer: DDPOTrainer) -> None:
    scheduler = trainer._policy.scheduler
    transition = scheduler.transition

    def rounding(model_output: Tensor, index: int, latents: Tensor, stochastic: bool) -> tuple[Tensor, float]:
        mean, std = transition(model_output, index, latents, stochastic)
        return mean.bfloat16().float() if isinstance(scheduler.source, Sampling) else mean, std

    vars(scheduler)["transition"] = rounding


def cast_latents(trainer: DDPOTrainer) -> None:
    pipeline = trainer._policy.runner.policy_pipeline
    prepare_latents = pipeline.prepare_latents
    pipeline.prepare_latents = lambda *args, **kwargs: prepare_latents(*args, **kwargs).bfloat16().float()


def add_from_the_second_step_on(trainer: DDPOTrainer) -> None:
    """A cache over steps, such as DeepCache, in small."""
    scheduler = trainer._policy.scheduler
    trainer._policy.denoiser.register_forward_hook(lambda m, i, output: (output[0] + 0.5 * (scheduler._visits > 0),))


@pytest.mark.parametrize(
    ("plant", "trainer_class"),
    [
        (id, OtherAutocast),
        (round_transitions_in_sampling, DDPOTrainer),
        (cast_latents, DDPOTrainer),
        (add_from_the_second_step_on, DDPOTrainer),
    ],
)
def test_an_unusual_cause_is_among_those_to_look_for(make_config, plant, trainer_class):
    config = make_config(num_inference_steps=10)
    trainer = make_trainer(config, trainer_class=trainer_class, pipeline=sensitive_pipeline())
    plant(trainer)  # in sampling too
    with pytest.raises(RuntimeError, match=OPENING + re.escape(NOT_FOUND)):
        trainer.train()


def test_a_cause_that_can_not_be_checked_hides_nothing(make_config, monkeypatch):
    def gardener(mismatch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("ddpo_trl.checks.causes.CAUSES", {"the gardener": gardener, **CAUSES})
    with pytest.raises(RuntimeError, match=OPENING + "Changed since sampling: 8 of the 16 trained weights"):
        make_trainer(make_config(), change_weights).train()
    with pytest.raises(RuntimeError, match=r"Ruled out: the gardener \(not tried: OutOfMemoryError\), randomness"):
        make_trainer(make_config(), change_a_frozen_weight).train()


def test_dropout_is_off_in_all_rounds_of_a_healthy_run(make_config):
    trainer = make_trainer(make_config(num_train_epochs=2), pipeline=with_dropout())
    trainer.train()
    assert deviations(trainer) == [0.0, 0.0]


@pytest.mark.parametrize("plant", [turn_on_dropout, change_guidance, draw_in_a_hook, switch_to_training_at_each_call])
def test_the_search_for_a_cause_leaves_the_policy_as_it_was(make_config, plant):
    trainer = make_trainer(make_config(), plant, pipeline=with_dropout())
    with pytest.raises(RuntimeError, match="The step is random|Changed since"):
        trainer.train()
    policy = trainer._policy
    assert policy.settings.guidance_scale == (7.0 if plant is change_guidance else 3.0)
    assert policy.denoiser.training == (plant in (turn_on_dropout, switch_to_training_at_each_call))
    assert len(policy.denoiser._forward_hooks) == (plant is draw_in_a_hook)
    assert {module.p for module in policy.denoiser.modules() if isinstance(module, nn.Dropout) and module.p} == {0.5}


# ---- When it looks ----


def test_a_later_round_reports_what_the_first_one_would_stop_at(make_config):
    class SecondRound(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                change_guidance(trainer)

    trainer = make_trainer(make_config(num_train_epochs=2))
    trainer.add_callback(SecondRound())
    trainer.train()
    first, second = deviations(trainer)
    assert first == 0.0 and second > FLOAT32_TOLERANCE


def test_a_resumed_run_is_guarded_too(make_config):
    make_trainer(make_config(save_strategy="epoch")).train()
    resumed = make_trainer(make_config(save_strategy="epoch", num_train_epochs=2), change_guidance)
    with pytest.raises(RuntimeError, match=OPENING + "Changed since sampling: guidance_scale"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 1


def test_in_half_precision_a_small_fault_stops_the_run_and_rounding_of_its_size_does_not(make_config):
    """What another batch size moves is told from a fault by a replay at the batch size of sampling."""

    def slightly(trainer: DDPOTrainer) -> None:
        trainer.args.guidance_scale = 3.5

    with pytest.raises(RuntimeError, match=r"differ by 0\.0\d+ .*guidance_scale was 3\.0"):
        make_trainer(make_config(bf16=True), slightly).train()
    pipeline = tiny_pipeline()
    trainer = make_trainer(make_config(bf16=True, per_device_train_batch_size=1), pipeline=pipeline)
    pipeline.unet.register_forward_hook(off_by(0.004, sample_too=True))
    trainer.train()
    assert deviations(trainer)[0] > FLOAT32_TOLERANCE


def test_sharded_weights_are_not_replayed_alone(make_config, monkeypatch):
    """The other processes would wait for ever."""
    monkeypatch.setattr("ddpo_trl.checks.causes.is_sharded", lambda policy: True)
    with pytest.raises(RuntimeError, match="with sharded weights one process can't replay alone"):
        make_trainer(make_config(), change_guidance).train()


def test_the_doctor_gives_the_same_diagnosis(make_config):
    pipeline = tiny_pipeline()
    pipeline.unet.register_forward_hook(lambda *args: (args[2][0] + torch.randn_like(args[2][0]),))
    report = check_pipeline(pipeline, prompts=PROMPTS[:2])
    assert report.problem is not None and re.search(OPENING + "The step is random", report.problem)


def test_no_problem_is_no_sentence(make_config):
    trainer = make_trainer(make_config())
    trainer.train()
    batch = trainer.rollout.transition([0, 1], step=2, on_policy=True)
    origins = [trainer.rollout.origin(sample) for sample in (0, 1)]
    assert replay_problem(trainer._policy, batch, batch.log_probs + 5e-6, origins) is None
