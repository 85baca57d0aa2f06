"""DDPOTrainer: the round, its arithmetic, what it logs, saves and refuses."""

import asyncio
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler, StableDiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from conformance.image_pipelines import images as different_images
from conformance.image_pipelines import inpainting_inputs, stable_diffusion_img2img, stable_diffusion_inpainting
from conftest import brightness, in_both_passes, needs_newest, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.rollout.callbacks import TrainingClock
from ddpo_trl.rollout.records import Rollout


PROMPTS = ["cat", "dog", "owl"]


class GradientRecorder(TrainerCallback):
    """Keeps the accumulated gradient of the first optimizer step, before anything is done to it."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {
                name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
            }


def gradients_of_a_round(config, pipeline=None, reward_fn=brightness) -> dict[str, torch.Tensor]:
    recorder = GradientRecorder()
    pipeline = pipeline or tiny_pipeline()
    DDPOTrainer(config, reward_fn, PROMPTS, pipeline, callbacks=[recorder]).train()
    return recorder.gradients


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    largest = max(gradient.abs().max().item() for gradient in left.values())
    assert largest > 0
    return max((left[name] - right[name]).abs().max().item() for name in left) / largest


def lora_weights(trainer: DDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# ---- Gradients ----


@pytest.mark.parametrize("loss_type", ["is", "sf"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(make_config, loss_type, micro_batch):
    settings = {"loss_type": loss_type, "max_grad_norm": 0.0, "kl_coef": 0.5}
    whole = gradients_of_a_round(make_config(per_device_train_batch_size=8, **settings))
    split = gradients_of_a_round(make_config(per_device_train_batch_size=micro_batch, **settings))
    assert relative_difference(whole, split) < 1e-4


@in_both_passes
def test_score_function_and_importance_sampling_have_one_gradient_on_policy(make_config):
    of = {kind: gradients_of_a_round(make_config(loss_type=kind, max_grad_norm=0.0)) for kind in ("sf", "is")}
    assert relative_difference(of["sf"], of["is"]) < 1e-5


@in_both_passes
@pytest.mark.parametrize("weighting", ["uniform", "std"])
def test_the_gradient_is_that_of_the_formula(make_config, weighting):
    """−mean over samples and steps of w · A · ∇log π, by autograd on a rollout that is replayed in one piece."""
    settings = {"loss_type": "sf", "max_grad_norm": 0.0, "transition_weighting": weighting}
    actual = gradients_of_a_round(make_config(**settings))
    config = make_config(**settings, one_pass=False, learning_rate=0.0)  # which keeps transitions and weights
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    rewards = trainer.rollout.rewards
    advantages = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)).clamp(-5, 5).float()
    stds = torch.tensor(trainer.model.scheduler.stds)
    weights = stds / stds.mean() if weighting == "std" else torch.ones(4)
    losses = []
    for step in range(4):
        batch = trainer.rollout.transition(range(8), step, on_policy=True)
        log_probs, _ = trainer.model(step, batch.latents, batch.next_latents, batch.context)
        losses.append(-(weights[step] * advantages * log_probs).mean())
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(parameters.values()))
    assert relative_difference(actual, dict(zip(parameters, expected, strict=True))) < 1e-4


@in_both_passes
@pytest.mark.parametrize("loss_type", ["is", "sf"])
@pytest.mark.parametrize("normalization", ["batch", "prompt", "group"])
def test_equal_rewards_give_a_zero_gradient(make_config, loss_type, normalization):
    config = make_config(
        loss_type=loss_type, advantage_normalization=normalization, max_grad_norm=0.0, num_images_per_prompt=2
    )
    gradients = gradients_of_a_round(config, reward_fn=lambda images, prompts, metadata: [0.3] * len(images))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_only_the_transitions_in_train_timestep_range_are_trained_on(make_config):
    config = make_config(one_pass=False, train_timestep_range=[0.25, 0.75])
    trainer = RecordingTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    seen = trainer.seen
    assert {micro_batch["step"] for micro_batch in seen} == {1, 2}
    assert set(trainer.rollout.batches[0].steps) == {1, 2}  # the others are not even kept


def test_timestep_fraction_draws_other_transitions_in_each_round(make_config):
    config = make_config(timestep_fraction=0.5, num_inference_steps=10, num_train_epochs=3)
    trainer = RecordingTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    seen = trainer.seen
    per_round = len(seen) // 3
    assert per_round == 2 * 5  # two micro-batches of samples, half of ten steps each
    drawn = [tuple(micro_batch["step"] for micro_batch in seen[i : i + 5]) for i in range(0, len(seen), 5)]
    assert all(len(set(steps)) == 5 for steps in drawn)
    assert len(set(drawn)) > 1


@in_both_passes
@pytest.mark.parametrize(
    ("settings", "window_of_round"),
    [
        ({}, [0, 0, 0]),
        ({"train_timestep_range": [0.25, 1.0]}, [1, 1, 1]),
        ({"sde_window_strategy": "progressive", "sde_window_interval": 1}, [0, 1, 2]),
        ({"sde_window_strategy": "random", "seed": 1}, None),
    ],
    ids=["fixed", "fixed in a range", "progressive", "random"],
)
def test_only_the_steps_of_the_window_get_noise_are_recorded_and_are_trained_on(
    make_config, settings, window_of_round
):
    config = make_config(sde_window_size=1, num_train_epochs=3, learning_rate=0.0, **settings)
    trainer = RecordingTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    windows = [steps_with_noise(trainer, rollout) for rollout in trainer.rollouts]
    if window_of_round is None:
        assert all(len(window) == 1 for window in windows) and len(set(map(tuple, windows))) > 1
    else:
        assert windows == [[step] for step in window_of_round]
    if trainer.plan.one_pass:
        assert all(rollout.log_probs.shape == (8, 1) for rollout in trainer.rollouts)
    else:
        assert [list(rollout.batches[0].steps) for rollout in trainer.rollouts] == windows
        trained = [micro_batch["step"] for micro_batch in trainer.seen]
        assert trained == [window[0] for window in windows for _ in range(2)]  # two micro-batches of samples


def steps_with_noise(trainer: "RecordingTrainer", rollout: Rollout) -> list[int]:
    """The step that alone has to have noise for the images of a rollout; the learning rate is 0."""
    return [
        step
        for step in range(4)
        if all(
            torch.equal(batch.images, trainer._policy.sample(batch.context, stochastic={step}).images)
            for batch in rollout.batches
        )
    ]


def test_every_pass_visits_every_transition_once_in_optimizer_steps_of_equal_size(make_config):
    config = make_config(num_ppo_epochs=2, num_mini_batches=2, per_device_train_batch_size=2)
    trainer = RecordingTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    seen = trainer.seen
    assert trainer.state.global_step == 4
    assert len(seen) == 4 * trainer.args.gradient_accumulation_steps
    for half in (seen[: len(seen) // 2], seen[len(seen) // 2 :]):
        visits = sorted((sample, batch["step"]) for batch in half for sample in batch["samples"])
        assert visits == [(sample, step) for sample in range(8) for step in range(4)]
    assert [batch["on_policy"] for batch in seen] == [index < 8 for index in range(32)]


class RecordingTrainer(DDPOTrainer):
    """Keeps the rollouts, and the micro-batches in the order in which they are trained on."""

    def __init__(self, *args, **kwargs):
        self.seen: list[dict[str, Any]] = []
        self.rollouts: list[Rollout] = []
        super().__init__(*args, **kwargs)

    def _start_updates(self, rollout):
        self.rollouts.append(rollout)
        super()._start_updates(rollout)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


# ---- The run ----


def test_images_differ_between_samples_and_between_rounds(make_config):
    config = make_config(num_train_epochs=3, learning_rate=0.0)
    trainer = RecordingTrainer(config, brightness, ["cat"], tiny_pipeline())  # nothing but the seeds differs
    trainer.train()
    images = torch.cat([rollout.images for rollout in trainer.rollouts]).flatten(1)
    assert len(images) == 3 * 8
    assert torch.pdist(images).min() > 1e-2


def test_a_run_without_updates_has_ratio_one_in_every_round(make_config):
    config = make_config(one_pass=False, learning_rate=0.0, num_train_epochs=2)
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    for log in reward_logs(trainer):
        assert log["val/ratio_deviation"] == 0.0
        assert log["val/ratio"] == 1.0
        assert log["policy/approxkl_avg"] == 0.0


def test_later_updates_of_a_round_are_measured_against_the_policy_that_sampled_it(make_config):
    """One step far beyond ε takes every ratio out of the trusted interval; on-policy, none can be."""
    settings = {"learning_rate": 0.1, "cliprange": 1e-8}
    first = DDPOTrainer(make_config(**settings), brightness, PROMPTS, tiny_pipeline())
    first.train()
    assert reward_logs(first)[0]["policy/clipfrac_avg"] == 0.0
    both = DDPOTrainer(make_config(num_ppo_epochs=2, **settings), brightness, PROMPTS, tiny_pipeline())
    both.train()
    assert reward_logs(both)[0]["policy/clipfrac_avg"] > 0.45  # all of the second half
    assert reward_logs(both)[0]["policy/approxkl_avg"] > 0


def test_a_pipeline_that_does_not_repeat_itself_stops_the_first_round(make_config):
    pipeline = tiny_pipeline()
    pipeline.unet.register_forward_hook(lambda *args: (args[2][0] + torch.randn_like(args[2][0]),))
    trainer = DDPOTrainer(make_config(one_pass=False), brightness, PROMPTS, pipeline)
    with pytest.raises(RuntimeError, match="another log-probability in training than in sampling"):
        trainer.train()


def test_the_logs_carry_the_fields_names(make_config):
    config = make_config(num_train_epochs=2, kl_coef=0.1, num_mini_batches=2, reward_weights=[1.0, 0.5])
    trainer = DDPOTrainer(config, [brightness, lambda i, p, m: [2.0] * len(i)], PROMPTS, tiny_pipeline())
    trainer.train()
    logs = reward_logs(trainer)
    assert [log["episode"] for log in logs] == [8, 16]
    assert {
        "reward", "reward_std", "rewards/brightness/mean", "rewards/brightness/std", "rewards/<lambda>/mean",
        "objective/kl", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "val/ratio_deviation", "eps",
        "loss", "grad_norm", "learning_rate", "time/sampling", "time/scoring", "time/training",
    } <= logs[0].keys()  # fmt: skip
    assert logs[0]["reward"] == pytest.approx(logs[0]["rewards/brightness/mean"] + 0.5 * 2.0, rel=1e-5)
    assert logs[0]["val/ratio_deviation"] == 0.0


def reward_logs(trainer: DDPOTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "reward" in log]


def test_total_episodes_gives_whole_rounds(make_config):
    trainer = DDPOTrainer(make_config(total_episodes=20), brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    assert [log["episode"] for log in reward_logs(trainer)] == [8, 16, 24]


def test_the_kl_to_the_reference_holds_the_policy_back(make_config):
    """The KL of the last round is smaller the more it weighs; with weight 0 it costs no reference pass."""

    def last_kl(kl_coef):
        config = make_config(kl_coef=kl_coef, num_train_epochs=4, cliprange=1.0, max_grad_norm=0.0)
        trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
        trainer.train()
        return reward_logs(trainer)[-1]["objective/kl"]

    assert last_kl(1e4) < 0.5 * last_kl(1e-6)


def test_the_denoiser_runs_once_per_transition_without_kl_and_twice_with_it(make_config):
    def calls(kl_coef):
        pipeline = tiny_pipeline()
        trainer = DDPOTrainer(make_config(one_pass=False, kl_coef=kl_coef), brightness, PROMPTS, pipeline)
        count = []
        pipeline.unet.register_forward_hook(lambda *_: count.append(1))
        trainer.train()
        return len(count)

    sampling, training = 2 * 4, 2 * 4  # batches or micro-batches x steps
    assert calls(0.0) == sampling + training
    assert calls(0.1) == sampling + 2 * training


@pytest.mark.parametrize("settings", [{"use_lora": False}, {"use_lora": False, "kl_coef": 0.1}])
def test_full_fine_tuning_moves_and_saves_the_denoisers_own_weights(make_config, settings, tmp_path):
    pipeline = tiny_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    trainer = DDPOTrainer(make_config(**settings), brightness, PROMPTS, pipeline)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    trainer.save_model(tmp_path / "saved")
    fresh = tiny_pipeline()
    fresh.unet = type(fresh.unet).from_pretrained(tmp_path / "saved", subfolder="unet")
    assert torch.equal(images_of(fresh), images_of(pipeline))


def test_full_fine_tuning_leaves_alone_what_the_user_froze(make_config):
    pipeline = tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    pipeline.unet.conv_out.requires_grad_(True)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    DDPOTrainer(make_config(use_lora=False), brightness, PROMPTS, pipeline).train()
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("conv_out")), name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("activation_checkpointing", marks=needs_newest("transformers before 5.24 has the other name")),
        "gradient_checkpointing",
    ],
)
def test_activation_checkpointing_gives_the_same_gradient_by_both_names(make_config, name):
    """The first is the name since transformers 5.24."""
    pipeline = tiny_pipeline()
    plain = gradients_of_a_round(make_config(max_grad_norm=0.0))
    checkpointed = gradients_of_a_round(make_config(max_grad_norm=0.0, **{name: True}), pipeline)
    assert pipeline.unet.is_gradient_checkpointing
    assert relative_difference(plain, checkpointed) < 1e-5


@in_both_passes
@pytest.mark.parametrize("settings", [{"num_train_epochs": 2}, {"max_steps": 2}])
def test_the_trainers_samples_per_second_are_reward_queries(make_config, one_pass, settings):
    trainer = DDPOTrainer(make_config(**settings), brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    end = trainer.state.log_history[-1]
    assert end["train_samples_per_second"] * end["train_runtime"] == pytest.approx(2 * 8, rel=0.01)


def test_mixed_precision_samples_and_trains_under_the_same_autocast(make_config):
    trainer = DDPOTrainer(make_config(one_pass=False, bf16=True), brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    assert reward_logs(trainer)[0]["val/ratio_deviation"] == 0.0


@in_both_passes
def test_half_precision_pipelines_train_a_float32_adapter(make_config):
    pipeline = tiny_pipeline().to(torch.bfloat16)
    trainer = DDPOTrainer(make_config(), brightness, PROMPTS, pipeline)
    before = lora_weights(trainer)
    trainer.train()
    after = lora_weights(trainer)
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in after)
    assert pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    assert trainer.plan.one_pass or reward_logs(trainer)[0]["val/ratio_deviation"] == 0.0


@in_both_passes
def test_two_runs_with_one_seed_are_equal_to_the_bit_and_another_seed_is_not(make_config):
    def run(seed):
        trainer = DDPOTrainer(make_config(seed=seed, num_train_epochs=2), brightness, PROMPTS, tiny_pipeline())
        trainer.train()
        return lora_weights(trainer)

    first, again, other = run(3), run(3), run(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def rounding_by_batch_size(unet, inputs, outputs):
    """What some processors do by themselves: the last bits of a sample go by how many there are beside it."""
    (prediction,) = outputs
    return (prediction * (1 + 1e-6 / len(prediction)),)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"num_ppo_epochs": 2}, True),
        ({"num_ppo_epochs": 2, "cliprange": 1e-2}, False),
        ({"num_ppo_epochs": 2, "per_device_train_batch_size": 4}, False),
        ({"num_ppo_epochs": 1}, False),
    ],
)
def test_rounding_beyond_the_cliprange_is_warned_of(make_config, caplog, settings, warns):
    settings = {"per_device_train_batch_size": 1, "cliprange": 1e-12, **settings}
    pipeline = tiny_pipeline()
    pipeline.unet.register_forward_hook(rounding_by_batch_size)
    trainer = DDPOTrainer(make_config(**settings), brightness, PROMPTS, pipeline)
    with caplog.at_level("WARNING", logger="ddpo_trl"):
        trainer.train()
    messages = [record.getMessage() for record in caplog.records if record.name == "ddpo_trl.checks.replay"]
    assert sum("clipping depends on rounding" in message for message in messages) == warns


def test_the_images_of_a_round_do_not_depend_on_the_sample_batch_size_and_their_noise_to_the_bit(make_config):
    rollouts = {}
    for size in (1, 4, 16):
        config = make_config(
            per_device_sample_batch_size=size, num_sample_batches=16 // size, num_train_epochs=2, learning_rate=0.0,
            one_pass=False,
        )  # fmt: skip
        trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
        trainer.train()
        rollouts[size] = trainer.rollout  # of the second round
    samples = list(range(16))
    noise = {size: [rollout.origin(sample).steps[0] for sample in samples] for size, rollout in rollouts.items()}
    for size in (4, 16):
        assert rollouts[size].prompts == rollouts[1].prompts
        assert torch.allclose(rollouts[size].images, rollouts[1].images, atol=1e-5)
        for sample in samples:  # the first state is nothing but noise
            assert torch.equal(noise[size][sample].latents[sample % size], noise[1][sample].latents[0])


@pytest.mark.parametrize(
    ("normalization", "one_pass"), [("batch", True), ("prompt", False)], ids=["one pass", "two passes"]
)
def test_a_run_resumed_after_a_round_ends_as_if_never_interrupted(make_config, normalization, one_pass, tmp_path):
    updates = 1 if one_pass else 2  # of a round
    settings = {
        "num_train_epochs": 4,
        "save_strategy": "epoch",
        "advantage_normalization": normalization,
        "per_prompt_stat_tracking_min_count": 2,
        "num_mini_batches": updates,
    }

    def random_prompt() -> tuple[str, Any]:
        return str(np.random.choice(PROMPTS)), {}

    whole = DDPOTrainer(
        make_config(output_dir=str(tmp_path / "whole"), **settings), brightness, random_prompt, tiny_pipeline()
    )
    whole.train()
    config = make_config(output_dir=str(tmp_path / "parts"), **settings)
    stopper = StopAfter(steps=2 * updates)
    DDPOTrainer(config, brightness, random_prompt, tiny_pipeline(), callbacks=[stopper]).train()
    resumed = DDPOTrainer(config, brightness, random_prompt, tiny_pipeline())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 * updates
    expected = lora_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in lora_weights(resumed).items())
    rewards = [[log["reward"] for log in reward_logs(trainer)] for trainer in (whole, resumed)]
    assert rewards[0] == rewards[1]


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


# ---- LoRA in and out ----


def images_of(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(index) for index in range(3)]
    return pipeline(PROMPTS, generator=generators, num_inference_steps=3, output_type="pt").images


@pytest.mark.parametrize(
    "peft_config",
    [
        None,
        LoraConfig(r=2, lora_alpha=16, target_modules=["to_q", "to_v"]),
        LoraConfig(r=2, lora_alpha=8, target_modules=["to_k", "conv1", "time_emb_proj"], use_rslora=True),
    ],
    ids=["default", "alpha", "rslora-conv"],
)
def test_saved_lora_loads_in_plain_diffusers_and_gives_the_same_images(make_config, tmp_path, peft_config):
    pipeline = tiny_pipeline()
    before = images_of(pipeline)
    trainer = DDPOTrainer(make_config(learning_rate=0.1), brightness, PROMPTS, pipeline, peft_config=peft_config)
    trainer.train()
    trainer.save_model(tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    fresh = tiny_pipeline()
    fresh.load_lora_weights(tmp_path / "lora")
    assert torch.allclose(images_of(fresh), images_of(pipeline), atol=1e-6)
    assert (images_of(fresh) - before).abs().max() > 1e-3


def test_an_adapter_that_the_pipeline_carries_goes_on_training(make_config, tmp_path):
    first = DDPOTrainer(make_config(learning_rate=0.1), brightness, PROMPTS, tiny_pipeline())
    first.train()
    first.save_model(tmp_path / "lora")
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="mine")
    second = DDPOTrainer(make_config(learning_rate=0.1), brightness, PROMPTS, pipeline)
    start = lora_weights(second)
    assert len(start) == len(lora_weights(first))
    second.train()
    assert all(not torch.equal(weight, start[name]) for name, weight in lora_weights(second).items())
    second.save_model(tmp_path / "again")
    fresh = tiny_pipeline()
    fresh.load_lora_weights(tmp_path / "again")
    assert torch.allclose(images_of(fresh), images_of(pipeline), atol=1e-6)


def test_a_checkpoint_of_another_lora_config_is_refused(make_config):
    config = make_config(save_strategy="epoch")
    DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline()).train()
    other = LoraConfig(r=4, target_modules=["to_q"])
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), peft_config=other)
    with pytest.raises(ValueError, match="Resume with the LoRA config"):
        trainer.train(resume_from_checkpoint=True)


# ---- Rewards and prompts ----


async def awaited(images, prompts, metadata):
    await asyncio.sleep(0)
    return brightness(images, prompts, metadata)


class Scorer:
    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata).tolist(), {"info": 1}


@pytest.mark.parametrize(
    "reward_fn",
    [
        awaited,
        Scorer(),
        lambda images, prompts, metadata: (brightness(images, prompts, metadata).numpy(), {}),
        lambda images, prompts, metadata: list(brightness(images, prompts, metadata)),
    ],
    ids=["async", "object", "trl", "list-of-tensors"],
)
def test_every_form_of_reward_trains_alike(make_config, reward_fn):
    expected = gradients_of_a_round(make_config(max_grad_norm=0.0))
    actual = gradients_of_a_round(make_config(max_grad_norm=0.0), reward_fn=reward_fn)
    assert relative_difference(expected, actual) < 1e-5


def test_integer_rewards_are_not_truncated(make_config):
    def steps(images, prompts, metadata):
        return [{"cat": 0, "dog": 1, "owl": 3}[prompt] for prompt in prompts]

    trainer = DDPOTrainer(make_config(), steps, PROMPTS, tiny_pipeline())
    trainer.train()
    rewards = trainer.rollout.rewards
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    assert torch.allclose(trainer.rollout.advantages.double(), expected, atol=1e-4)


def test_a_weighted_list_is_the_sum(make_config):
    config = make_config(reward_weights=[2.0, -1.0], max_grad_norm=0.0, advantage_normalization="none")
    several = DDPOTrainer(config, [brightness, brightness], PROMPTS, tiny_pipeline())
    several.train()
    single = DDPOTrainer(make_config(advantage_normalization="none"), brightness, PROMPTS, tiny_pipeline())
    single.train()
    assert torch.allclose(several.rollout.rewards, single.rollout.rewards)


@pytest.mark.parametrize("kind", ["list", "dataset", "function"])
def test_prompts_and_metadata_reach_the_reward_function(make_config, kind):
    seen: list[tuple[str, Any]] = []

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, metadata, strict=True))
        return [0.0, 1.0] * (len(prompts) // 2)

    prompt_fn = {
        "list": ["a cat", "a dog"],
        "dataset": Dataset.from_dict({"prompt": ["a cat", "a dog"], "legs": [4, 3]}),
        "function": lambda: ("a cat", {"legs": 4}),
    }[kind]
    DDPOTrainer(make_config(), reward, prompt_fn, tiny_pipeline()).train()
    expected = {
        "list": {("a cat", "{}"), ("a dog", "{}")},
        "dataset": {("a cat", "{'legs': 4}"), ("a dog", "{'legs': 3}")},
        "function": {("a cat", "{'legs': 4}")},
    }[kind]
    assert {(prompt, str(metadata)) for prompt, metadata in seen} == expected
    assert len(seen) == 8


def img2img_pipeline() -> Any:
    return stable_diffusion_img2img(0)


IMAGE_PAIRS = list(zip(PROMPTS, ({"image": image} for image in different_images(3)), strict=True))


@in_both_passes
def test_metadata_named_in_pipeline_inputs_is_handed_to_the_pipeline_for_each_sample(make_config):
    pipeline = img2img_pipeline()
    handed: list[list[Any]] = []
    preprocess = pipeline.image_processor.preprocess

    def noted(image, *args, **kwargs):
        handed.append(image)
        return preprocess(image, *args, **kwargs)

    pipeline.image_processor.preprocess = noted
    config = make_config(pipeline_inputs=["image"], pipeline_kwargs={"strength": 0.75})
    trainer = RecordingTrainer(config, brightness, IMAGE_PAIRS, pipeline, eval_prompts=IMAGE_PAIRS)
    handed.clear()
    trainer.train()
    image_of = {prompt: metadata["image"] for prompt, metadata in IMAGE_PAIRS}
    # two batches are sampled, then the micro-batches of shuffled samples are replayed: 2 at 3 steps, all that are run
    replayed = 0 if trainer.plan.one_pass else 2 * 3
    assert len(handed) == 2 + len(trainer.seen) == 2 + replayed
    prompts = trainer.rollout.prompts
    samples = [range(4), range(4, 8), *(micro_batch["samples"] for micro_batch in trainer.seen)]
    for images, rows in zip(handed, samples, strict=True):
        assert len(images) == 4
        assert all(image is image_of[prompts[row]] for image, row in zip(images, rows, strict=True))
    assert trainer.plan.one_pass or reward_logs(trainer)[0]["val/ratio_deviation"] == 0.0
    # and to the pipeline with its own scheduler
    handed.clear()
    samples_of_eval = trainer.generate_samples()
    assert handed == [[metadata["image"] for _, metadata in IMAGE_PAIRS]]
    assert samples_of_eval.prompts == PROMPTS


def test_what_a_pipeline_draws_beside_its_latents_belongs_to_the_sample(make_config):
    """Inpainting draws the masked image's latents too; the micro-batches mix samples of both batches."""
    inputs = inpainting_inputs(3)
    images, masks = inputs["image"], inputs["mask_image"]
    pairs = [(prompt, {"image": images[i], "mask_image": masks[i]}) for i, prompt in enumerate(PROMPTS)]
    config = make_config(one_pass=False, pipeline_inputs=["image", "mask_image"])
    trainer = RecordingTrainer(config, brightness, pairs, stable_diffusion_inpainting(0))
    trainer.train()
    assert any({sample // 4 for sample in micro_batch["samples"]} == {0, 1} for micro_batch in trainer.seen)
    assert reward_logs(trainer)[0]["val/ratio_deviation"] == 0.0


def test_a_dataset_has_a_column_for_each_pipeline_input(make_config):
    dataset = Dataset.from_list([{"prompt": prompt, **metadata} for prompt, metadata in IMAGE_PAIRS])
    trainer = DDPOTrainer(make_config(pipeline_inputs=["image"]), brightness, dataset, img2img_pipeline())
    trainer.train()
    pixels = {prompt: np.asarray(metadata["image"]) for prompt, metadata in IMAGE_PAIRS}
    for batch in trainer.rollout.batches:
        for prompt, image in zip(batch.context.prompts, batch.context.inputs["image"], strict=True):
            assert np.array_equal(np.asarray(image), pixels[prompt])


@pytest.mark.parametrize("metadata", [{}, {"mask_image": 1}, None, "image", 3], ids=repr)
def test_a_missing_pipeline_input_is_named_at_construction(make_config, metadata):
    config = make_config(pipeline_inputs=["image"])
    with pytest.raises(ValueError, match=r"pipeline_inputs names 'image', but the metadata of a prompt is"):
        DDPOTrainer(config, brightness, lambda: ("cat", metadata), img2img_pipeline())


def test_a_pipeline_input_that_is_missing_later_is_named_too(make_config):
    trainer = DDPOTrainer(make_config(pipeline_inputs=["image"]), brightness, IMAGE_PAIRS, img2img_pipeline())
    with pytest.raises(ValueError, match=r"pipeline_inputs names 'image', but prompts\[0\] has no metadata"):
        trainer.generate_samples(PROMPTS)


def test_images_of_a_prompt_come_together(make_config):
    config = make_config(num_images_per_prompt=4, advantage_normalization="group")
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    prompts = trainer.rollout.prompts
    assert prompts[:4] == [prompts[0]] * 4 and prompts[4:] == [prompts[4]] * 4 and prompts[0] != prompts[4]
    groups = trainer.rollout.advantages.view(2, 4)
    assert torch.allclose(groups.mean(1), torch.zeros(2), atol=1e-5)


def test_a_reward_function_that_fails_in_a_round_is_named_and_leaves_the_checkpoint(make_config, tmp_path):
    calls = []

    def fragile(images, prompts, metadata):
        calls.append(1)
        if len(calls) > 2:  # the batches of the first round
            raise ConnectionError("server gone")
        return brightness(images, prompts, metadata)

    config = make_config(num_train_epochs=2, save_strategy="epoch", max_workers=1)
    trainer = DDPOTrainer(config, fragile, PROMPTS, tiny_pipeline())
    with pytest.raises(RuntimeError, match=r"`fragile` raised ConnectionError: server gone \(round 1, prompts \['"):
        trainer.train()
    calls.clear()  # the server is back
    resumed = DDPOTrainer(config, fragile, PROMPTS, tiny_pipeline())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


# ---- What is refused at construction ----


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda n: [1.0] * (n - 1), "returned 1 values for 2 images"),
        (lambda n: 3.0, "returned 3.0; it must return one number per image"),
        (lambda n: [1.0, "good"], r"returned 'good' for image 1; it must be a number"),
        (lambda n: [None, 1.0], r"returned None for image 0"),
        (lambda n: [1.0, float("nan")], r"returned nan for image 1; rewards must be finite"),
    ],
)
def test_a_faulty_reward_function_is_refused_at_construction(make_config, answer, message):
    def faulty(images, prompts, metadata):
        return answer(len(images))

    with pytest.raises((ValueError, TypeError), match=f"`faulty`.*{message}"):
        DDPOTrainer(make_config(try_reward_fn=True), faulty, PROMPTS, tiny_pipeline())


def test_a_reward_function_of_another_signature_is_refused_at_construction(make_config):
    with pytest.raises(TypeError, match=r"reward_fn\[0\] \(`only_images`\) .* called with three"):
        DDPOTrainer(make_config(), cast(Any, only_images), PROMPTS, tiny_pipeline())


def only_images(images: torch.Tensor) -> Any:
    return [0.0] * len(images)


def edm_pipeline() -> StableDiffusionPipeline:
    pipeline = tiny_pipeline()
    pipeline.scheduler = EDMEulerScheduler()
    return pipeline


def consistency_pipeline() -> StableDiffusionPipeline:
    pipeline = tiny_pipeline()
    pipeline.scheduler = CMStochasticIterativeScheduler()
    return pipeline


class WithoutGuidance(StableDiffusionPipeline):
    """A pipeline like those of guidance-distilled models."""

    def __call__(self, prompt, num_inference_steps=50, generator=None, output_type="pil", return_dict=True):
        raise NotImplementedError


def pipeline_without_guidance() -> StableDiffusionPipeline:
    return WithoutGuidance(**tiny_pipeline().components, requires_safety_checker=False)


def pipeline_with_adapter() -> StableDiffusionPipeline:
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return pipeline


def pipeline_with_two_adapters() -> StableDiffusionPipeline:
    pipeline = pipeline_with_adapter()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "second")
    pipeline.unet.set_adapters(["default", "second"])
    return pipeline


def clipping_pipeline() -> StableDiffusionPipeline:
    pipeline = tiny_pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, clip_sample=True)
    return pipeline


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": []}, "prompt_fn is empty"),
        ({"prompts": 3}, "prompt_fn is int"),
        ({"prompts": Dataset.from_dict({"text": ["a"]})}, "name the one with the texts 'prompt'"),
        ({"prompts": lambda: "cat"}, r"must return a pair \(prompt, metadata\)"),
        ({"eval_prompts": []}, "eval_prompts is empty"),
        ({"reward": []}, "reward_fn is an empty list"),
        ({"reward": [brightness, 3]}, r"reward_fn\[1\] is 3, which can't be called"),
        ({"config": {"reward_weights": [1.0, 2.0]}}, "reward_weights has 2 values for 1 reward functions"),
        ({"config": {"per_device_train_batch_size": 3}}, "don't divide into num_mini_batches"),
        ({"config": {"num_images_per_prompt": 3}}, "num_images_per_prompt = 3"),
        ({"config": {"train_timestep_range": [0.0, 0.1]}}, "holds no stochastic step"),
        ({"config": {"sde_window_size": 5}}, "sde_window_size is 5, more than the 4 stochastic steps"),
        (
            {"config": {"pipeline_kwargs": {"hight": 64}}},
            "pipeline_kwargs holds hight, which .* It takes prompt, height",
        ),
        ({"config": {"pipeline_inputs": ["image"]}}, "pipeline_inputs holds image, which the __call__ of StableDiff"),
        (
            {"pipeline": pipeline_without_guidance},
            r"guidance_scale is 3\.0, but the __call__ of WithoutGuidance takes",
        ),
        (
            {"pipeline": img2img_pipeline, "config": {"pipeline_inputs": ["image"]}},
            r"pipeline_inputs names 'image', but prompt_fn\[0\] has no metadata. Give it with each prompt",
        ),
        ({"pipeline": edm_pipeline}, "EDMEulerScheduler, whose steps can't be turned"),
        ({"pipeline": consistency_pipeline}, "CMStochasticIterativeScheduler, whose steps can't be turned"),
        ({"pipeline": clipping_pipeline}, "clip_sample is True"),
        ({"pipeline": pipeline_with_adapter, "peft": LoraConfig()}, "carries the adapter default already"),
        ({"pipeline": pipeline_with_two_adapters}, "several active adapters"),
        ({"pipeline": pipeline_with_adapter, "config": {"use_lora": False}}, "use_lora is False, but the pipeline"),
        ({"pipeline": lambda: tiny_pipeline().to(torch.float16), "config": {"use_lora": False}}, "must be|float16"),
    ],
)
def test_a_mistake_is_refused_at_construction_with_its_remedy(make_config, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DDPOTrainer(
            make_config(**arguments.get("config", {})),
            arguments.get("reward", brightness),
            arguments.get("prompts", PROMPTS),
            arguments.get("pipeline", tiny_pipeline)(),
            peft_config=arguments.get("peft"),
            eval_prompts=arguments.get("eval_prompts"),
        )


def test_a_run_that_failed_has_no_part_in_the_figures_of_the_next(make_config):
    rewards = [100.0]

    class Interrupt(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if rewards == [100.0]:
                raise KeyboardInterrupt

    def reward(images, prompts, metadata):
        return [rewards[0]] * len(images)

    trainer = DDPOTrainer(make_config(), reward, ["cat"], tiny_pipeline(), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    rewards[0] = 1.0
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "reward" in log]
    assert log["reward"] == 1.0 and log["episode"] == 8


def test_in_a_log_that_spans_rounds_times_are_sums_and_rewards_means(make_config):
    trainer = DDPOTrainer(make_config(), brightness, ["cat"], tiny_pipeline())
    trainer.metrics.add({"time/sampling": 2.0, "reward": 1.0, "val/ratio_deviation": 0.25})
    trainer.metrics.add({"time/sampling": 3.0, "reward": 2.0, "val/ratio_deviation": 0.5})
    metrics = trainer.metrics.take(trainer.accelerator)
    assert metrics == {"time/sampling": 5.0, "reward": 1.5, "val/ratio_deviation": 0.5}
    assert trainer.metrics.take(trainer.accelerator) == {}


def test_the_time_in_training_is_without_evaluation_and_sampling(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ddpo_trl.rollout.callbacks.time.perf_counter", lambda: now[0])
    clock, anything = TrainingClock(torch.device("cpu")), cast(Any, None)
    for sampling, training, evaluation in ((10.0, 1.0, 100.0), (20.0, 2.0, 200.0)):
        now[0] += sampling
        clock.start()
        now[0] += training
        clock.on_epoch_end(anything, anything, anything)
        now[0] += evaluation
    assert clock.take() == 3.0 and clock.take() == 0.0
