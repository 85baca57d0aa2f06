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
from ddpo_trl.checks.causes import CHANGED_CAUSES
from ddpo_trl.checks.mismatch import FLOAT32_TOLERANCE, is_dropout
from ddpo_trl.policy.schedulers import Sampling


PROMPTS = ["cat", "dog", "owl"]
CASES = {case.name: case for case in IMAGE_CASES}
OPENING = r"another log-probability in training than in sampling: they differ by \S+ per latent .* The cause is "

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
    trainer._policy.pipeline_kwargs["guidance_rescale"] = 1.0


def change_noise(trainer: DDPOTrainer) -> None:
    trainer._policy.scheduler.eta = 0.5


def scale_embeddings(trainer: DDPOTrainer) -> None:
    for embeddings, _ in trainer._policy.policy_pipeline.encode_prompt._cache._entries.values():
        embeddings[0].tensor.mul_(1.5)


def exchange_embeddings(trainer: DDPOTrainer) -> None:
    encoder = trainer._policy.policy_pipeline.encode_prompt
    entries = encoder._cache._entries
    entries.update(zip(list(entries), list(entries.values())[::-1], strict=True))
    encoder._present.clear()


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
        (turn_on_dropout, r"training mode: unet\.\S+, .* more are in it"),
        (switch_to_training_at_each_call, r"dropout: unet\.\S+, .*with p=0 the difference"),
        (change_guidance, r"a changed setting: guidance_scale was 30\.0 in sampling and is 7\.0 in training"),
        (change_option, r"a changed setting: pipeline_kwargs\['guidance_rescale'\] was 0\.1 in sampling and is 1\.0"),
        (change_noise, r"a changed setting: scheduler\.eta was 1\.0 in sampling and is 0\.5"),
        (scale_embeddings, "the prompt embeddings: they have changed since sampling"),
        (exchange_embeddings, "the prompt embeddings: they have changed since sampling"),
        (change_weights, r"changed weights: 8 of the 16 trained parameters .*\(down_blocks\.\S+lora_B"),
        (switch_adapter_off, r"the adapter: 8 of its 8 layers were enabled, disabled, merged or scaled"),
        (scale_adapter, r"the adapter: 8 of its 8 layers were enabled, disabled, merged or scaled"),
        (draw_in_a_hook, r"randomness in a forward hook: without the hooks on unet two replays agree"),
        (draw_elsewhere, r"randomness from torch's global generator: with the same seed two replays agree"),
        (act_with_gradients, r"the computation with gradients enabled"),
        (disturb_once, r"not reproducible: the difference vanished when"),
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
            r"the micro-batch: .*per_device_train_batch_size=2 against per_device_sample_batch_size=4\)\. Batches of",
        ),
        (
            mix_samples,
            {"per_device_train_batch_size": 1},
            r"the micro-batch: .*The pipeline mixes the samples of a batch",
        ),
        (
            mix_samples,
            {"per_device_train_batch_size": 4},
            r"the micro-batch: .*The pipeline mixes the samples of a batch",
        ),
    ],
    ids=["other size", "mixed, other size", "mixed, same size"],
)
def test_an_effect_of_the_micro_batch_is_named(make_config, plant, settings, cause):
    trainer = make_trainer(make_config(**settings))
    plant(trainer)  # in sampling too
    with pytest.raises(RuntimeError, match=OPENING + cause):
        trainer.train()


class OtherAutocast(DDPOTrainer):
    """A trainer whose author put autocast around the loss."""

    def compute_loss(self, *args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not self.args.bf16):
            return super().compute_loss(*args, **kwargs)


def test_autocast_in_training_only_is_named(make_config):
    trainer = make_trainer(make_config(), trainer_class=OtherAutocast, pipeline=sensitive_pipeline())
    with pytest.raises(RuntimeError, match=OPENING + "autocast: sampling ran without autocast and training does not"):
        trainer.train()


def sensitive_pipeline():
    """One whose predictions are large, so that rounding them moves log-probabilities by more than the tolerance."""
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(20)
    return pipeline


def test_autocast_in_sampling_only_is_named(make_config):
    trainer = make_trainer(make_config(), pipeline=sensitive_pipeline())
    sample = trainer._policy.sample

    def sample_in_bfloat16(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sample(*args, **kwargs)

    vars(trainer._policy)["sample"] = sample_in_bfloat16
    with pytest.raises(RuntimeError, match=OPENING + "autocast: sampling ran under autocast to bfloat16 and training"):
        trainer.train()


@pytest.mark.parametrize("when", ["sampling", "training"])
def test_a_scheduler_in_bfloat16_is_named(make_config, when):
    trainer = make_trainer(make_config(num_inference_steps=10))
    scheduler = trainer._policy.scheduler
    transition = scheduler.transition

    def rounding(model_output: Tensor, index: int, latents: Tensor, stochastic: bool) -> tuple[Tensor, float]:
        mean, std = transition(model_output, index, latents, stochastic)
        acts = isinstance(scheduler.source, Sampling) == (when == "sampling")
        return mean.bfloat16().float() if acts else mean, std

    vars(scheduler)["transition"] = rounding
    with pytest.raises(RuntimeError, match=f"{OPENING}the scheduler: .*: it computes in bfloat16 in {when}"):
        trainer.train()


def test_a_pipeline_that_casts_the_latents_it_is_given_is_named(make_config):
    trainer = make_trainer(make_config(num_inference_steps=10))
    pipeline = trainer._policy.policy_pipeline
    prepare_latents = pipeline.prepare_latents
    pipeline.prepare_latents = lambda *args, **kwargs: prepare_latents(*args, **kwargs).bfloat16().float()
    with pytest.raises(RuntimeError, match=OPENING + "the dtype of the latents: .* casts them to bfloat16"):
        trainer.train()


def test_an_option_that_acts_by_the_position_in_the_loop_is_named(make_config):
    case = CASES["Stable Diffusion ControlNet"]
    inputs = case.make_inputs(2) if case.make_inputs else {}
    pairs = [(prompt, {"image": image}) for prompt, image in zip(PROMPTS, inputs["image"], strict=False)]
    options = {"height": 16, "width": 16, "control_guidance_end": 0.5}
    config = make_config(pipeline_inputs=["image"], pipeline_kwargs=options)
    trainer = DDPOTrainer(config, brightness, pairs, case.build(0))
    with pytest.raises(RuntimeError, match=OPENING + "control_guidance_end in pipeline_kwargs: without it"):
        trainer.train()
    assert trainer._policy.pipeline_kwargs == options


def test_a_hook_that_counts_steps_is_named(make_config):
    """The steps that follow a first one get another prediction: a cache over steps, such as DeepCache, in small."""
    pipeline = tiny_pipeline()
    trainer = make_trainer(make_config(), pipeline=pipeline)
    pipeline.unet.register_forward_hook(lambda m, i, output: (output[0] + 0.5 * follows_another(trainer),))
    with pytest.raises(RuntimeError, match=OPENING + "a forward hook: without the hooks on unet sampling and"):
        trainer.train()


def follows_another(trainer: DDPOTrainer) -> bool:
    return trainer._policy.scheduler._visits > 0


def test_a_cache_over_steps_without_a_hook_is_named(make_config):
    pipeline = tiny_pipeline()
    trainer = make_trainer(make_config(), pipeline=pipeline)
    module: Any = pipeline.unet.conv_in
    forward = module.forward
    module.forward = lambda x: forward(x) + 0.5 * follows_another(trainer)
    with pytest.raises(RuntimeError, match=OPENING + "something that depends on the position in the loop"):
        trainer.train()


# ---- Honesty ----


def change_a_frozen_weight(trainer: DDPOTrainer) -> None:
    trainer._policy.denoiser.conv_out.bias.data.add_(0.5)


def test_without_a_known_cause_the_error_lists_what_was_ruled_out(make_config):
    sentence = (
        "Sampled and replayed again, the step does not differ: something has changed since it was sampled. The cause "
        "was not found. Ruled out: gradient mode, micro-batch size, training mode, autocast, guidance and other "
        "settings, dtype of the latents, prompt embeddings, adapter switches, trained weights."
    )
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        make_trainer(make_config(), change_a_frozen_weight).train()


def test_randomness_without_a_known_cause_lists_what_was_ruled_out(make_config):
    with pytest.raises(RuntimeError, match="a source of randomness.* Ruled out: training mode, dropout, forward "):
        make_trainer(make_config(), count_calls).train()


def test_a_cause_that_can_not_be_checked_hides_nothing(make_config, monkeypatch):
    def gardener(mismatch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("ddpo_trl.checks.replay.CHANGED_CAUSES", {"the gardener": gardener, **CHANGED_CAUSES})
    with pytest.raises(RuntimeError, match=OPENING + "changed weights"):
        make_trainer(make_config(), change_weights).train()
    with pytest.raises(RuntimeError, match=r"Ruled out: the gardener \(not tried: OutOfMemoryError\), gradient mode"):
        make_trainer(make_config(), change_a_frozen_weight).train()


def test_dropout_is_off_in_all_rounds_of_a_healthy_run(make_config):
    trainer = make_trainer(make_config(num_train_epochs=2), pipeline=with_dropout())
    trainer.train()
    assert deviations(trainer) == [0.0, 0.0]


@pytest.mark.parametrize("plant", [turn_on_dropout, change_guidance, draw_in_a_hook, switch_to_training_at_each_call])
def test_the_search_for_a_cause_leaves_the_policy_as_it_was(make_config, plant):
    trainer = make_trainer(make_config(), plant, pipeline=with_dropout())
    with pytest.raises(RuntimeError, match="The cause is"):
        trainer.train()
    policy = trainer._policy
    assert policy.settings.guidance_scale == (7.0 if plant is change_guidance else 3.0)
    assert policy.denoiser.training == (plant in (turn_on_dropout, switch_to_training_at_each_call))
    assert len(policy.denoiser._forward_hooks) == (plant is draw_in_a_hook)
    of_denoiser = {module.p for module in policy.denoiser.modules() if is_dropout(module)}
    assert of_denoiser == {0.5}
    assert "transition" not in vars(policy.scheduler)


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
    with pytest.raises(RuntimeError, match=OPENING + "a changed setting: guidance_scale"):
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
    monkeypatch.setattr("ddpo_trl.checks.replay.is_sharded", lambda policy: True)
    with pytest.raises(RuntimeError, match="with sharded weights one process can't replay alone"):
        make_trainer(make_config(), change_guidance).train()


def test_the_doctor_gives_the_same_diagnosis(make_config):
    pipeline = tiny_pipeline()
    pipeline.unet.register_forward_hook(lambda *args: (args[2][0] + torch.randn_like(args[2][0]),))
    report = check_pipeline(pipeline, prompts=PROMPTS[:2])
    assert report.problem is not None and re.search(OPENING + "randomness in a forward hook", report.problem)


def test_no_problem_is_no_sentence(make_config):
    trainer = make_trainer(make_config())
    trainer.train()
    batch = trainer.rollout.transition([0, 1], step=2, on_policy=True)
    origins = [trainer.rollout.origin(sample) for sample in (0, 1)]
    assert replay_problem(trainer._policy, batch, batch.log_probs + 5e-6, origins) is None
