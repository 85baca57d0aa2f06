"""What is not finite never reaches rewards, weights or disk: images, gradients and weights, in one pass and in two."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.evaluation.evaluator import diversity
from ddpo_trl.finite import NotFiniteError, check_update, finite_rows
from ddpo_trl.rewards import jpeg_compressibility
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rollout.advantages import select


PROMPTS = ["cat", "dog", "owl"]
STEPS = 4

both_passes = pytest.mark.parametrize("one_pass", [True, False], ids=["one_pass", "two_passes"])


class Spoiler:
    """Makes a network's output NaN for one row of the batch, at one call counted from when it is armed."""

    def __init__(self, network: torch.nn.Module, call: int, value: float = math.nan):
        self.call, self.value, self.count = call, value, math.inf
        network.register_forward_hook(self)

    def arm(self) -> None:
        self.count = 0

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        if self.count == self.call:
            (output[0] if isinstance(output, tuple) else output.sample)[-1] = self.value
        self.count += 1
        return output


def spoilt_decoder(pipeline: Any, rows: Sequence[int], value: float = math.nan) -> Callable[[], None]:
    """Make the autoencoder's images of these rows not finite from when the function that is returned is called."""
    decode = pipeline.vae.decode
    armed: list[bool] = []

    def overflowing(latents: Any, *args: Any, **kwargs: Any) -> Any:
        output = decode(latents, *args, **kwargs)
        if armed:
            (output[0] if isinstance(output, tuple) else output.sample)[list(rows)] = value
        return output

    pipeline.vae.decode = overflowing
    return lambda: armed.append(True)


def trained_weights(trainer: DDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# ---- Images ----


@both_passes
@pytest.mark.parametrize("step", [0, 2])
def test_an_overflow_of_the_denoiser_names_the_policy_the_round_and_the_step(make_config, one_pass, step):
    pipeline = tiny_pipeline()
    spoiler = Spoiler(pipeline.unet, call=step)
    trainer = DDPOTrainer(make_config(one_pass=one_pass), brightness, PROMPTS, pipeline)
    before = trained_weights(trainer)
    spoiler.arm()
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    for part in ("The policy sampled an image", "round 0, image 3", f"after denoising step {step} (of 0 to 3)"):
        assert part in str(caught.value)
    assert "brightness" not in str(caught.value)
    assert any("No round was saved" in note for note in caught.value.__notes__)
    assert all(torch.equal(value, before[name]) for name, value in trained_weights(trainer).items())


def test_an_overflow_of_the_autoencoder_is_named_as_that(make_config):
    pipeline = tiny_pipeline()
    overflow = spoilt_decoder(pipeline, rows=[1])
    trainer = DDPOTrainer(make_config(one_pass=None), brightness, PROMPTS, pipeline)
    overflow()
    with pytest.raises(NotFiniteError, match="round 0, image 1 .* finite after all 4 denoising steps, so the auto"):
        trainer.train()


def test_an_overflow_at_construction_is_refused_there_whatever_becomes_of_invalid_rewards(make_config):
    pipeline = tiny_pipeline()
    spoilt_decoder(pipeline, rows=[0])()
    with pytest.raises(NotFiniteError, match="check at construction, image 0"):
        DDPOTrainer(make_config(on_invalid_reward="drop"), brightness, PROMPTS, pipeline)


def test_reward_functions_see_finite_images_only_and_the_others_have_no_reward():
    images = torch.rand(3, 3, 8, 8)
    images[1, 0, 0, 0] = math.nan
    seen: list[Any] = []

    def keep(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        seen.append((images.clone(), prompts, metadata))
        return [10.0, 30.0]

    pending = RewardScorer([keep, brightness]).submit(images, ("a", "b", "c"), (1, 2, 3), when="round 4")
    rewards = pending.rewards_or_nan()
    assert rewards[:, 0].tolist() == pytest.approx([10.0, math.nan, 30.0], nan_ok=True)
    assert rewards[:, 1].isnan().tolist() == [False, True, False]
    assert torch.equal(seen[0][0], images[[0, 2]]) and seen[0][1:] == (("a", "c"), (1, 3))
    assert "policy sampled an image that is not finite (round 4, image 1 of its batch, prompt 'b')" in str(
        pending.problem()
    )
    nothing = RewardScorer(keep).submit(torch.full((2, 3, 8, 8), math.inf), ("a", "b"), (1, 2), when="round 4")
    assert nothing.rewards_or_nan().isnan().all() and len(seen) == 1


@both_passes
@pytest.mark.parametrize("place", ["denoiser", "autoencoder"])
def test_a_dropped_image_that_is_not_finite_leaves_the_update_of_one_that_has_no_reward(make_config, one_pass, place):
    """A JPEG of NaN is small: the best reward of all, if it had one."""
    settings = {"on_invalid_reward": "drop", "one_pass": one_pass, "num_sample_batches": 2, "num_train_epochs": 2}
    if not one_pass:
        settings["kl_coef"] = 0.5

    def without_reward(trainer_rounds: list[int]) -> Callable[..., Any]:
        def reward(images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
            rewards = list(jpeg_compressibility(images, prompts, metadata))
            trainer_rounds.append(len(images))
            return [*rewards[:3], None] if len(trainer_rounds) == 1 else rewards

        return reward

    config = make_config(max_workers=1, **settings)
    expected = DDPOTrainer(config, without_reward([]), PROMPTS, tiny_pipeline())
    expected.train()
    pipeline = tiny_pipeline()
    if place == "denoiser":
        arm = Spoiler(pipeline.unet, call=1).arm
    else:
        decode, calls = pipeline.vae.decode, []

        def arm() -> None:
            def overflowing(latents: Any, *args: Any, **kwargs: Any) -> Any:
                output = decode(latents, *args, **kwargs)
                calls.append(1)
                if len(calls) == 1:
                    (output[0] if isinstance(output, tuple) else output.sample)[3] = math.nan
                return output

            pipeline.vae.decode = overflowing

    trainer = DDPOTrainer(config, jpeg_compressibility, PROMPTS, pipeline)
    arm()
    trainer.train()
    for name, value in trained_weights(trainer).items():
        assert torch.equal(value, trained_weights(expected)[name])
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["rewards/invalid"] for log in logs] == [1 / 8, 0]
    assert all(math.isfinite(value) for log in logs for value in log.values())


def test_a_micro_batch_of_dropped_samples_only_adds_nothing(make_config):
    """The mean over all samples stays: half the batches dropped, half the gradient of the other half alone."""

    def gradient(batches: int, drop: bool) -> list[torch.Tensor]:
        calls: list[int] = []

        def reward(images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
            calls.append(1)
            values = brightness(images, prompts, metadata)
            return [None] * len(images) if drop and len(calls) == 2 else values

        config = make_config(
            on_invalid_reward="drop", num_sample_batches=batches, one_pass=False, max_workers=1, optim="sgd",
            learning_rate=1.0, max_grad_norm=0.0, weight_decay=0.0, loss_type="sf", per_device_train_batch_size=4,
        )  # fmt: skip
        trainer = DDPOTrainer(config, reward, PROMPTS, tiny_pipeline())
        before = trained_weights(trainer)
        trainer.train()
        return [before[name] - value for name, value in trained_weights(trainer).items()]

    for half, whole in zip(gradient(2, drop=True), gradient(1, drop=False), strict=True):
        torch.testing.assert_close(2 * half, whole, rtol=1e-3, atol=1e-6)


def test_a_finite_image_of_infinite_latents_has_no_reward():
    """AutoencoderTiny decodes tanh of the latents."""
    pending = RewardScorer(brightness).submit(
        torch.rand(2, 3, 8, 8), ("a", "b"), (1, 2), "round 4", torch.tensor([4, 2]), STEPS
    )
    assert pending.rewards_or_nan().isnan().flatten().tolist() == [False, True]
    assert "image 1 of its batch, prompt 'b'). Its latents are not finite after denoising step 2" in str(
        pending.problem()
    )


def test_diversity_is_that_of_the_finite_images():
    images = torch.rand(4, 3, 8, 8)
    images[3] = math.nan
    distance = (images[0] - images[1]).square().mean().sqrt().item()
    assert diversity([images[:2], images[2:]]) == pytest.approx(distance, rel=1e-5)
    assert diversity([images[2:]]) is None


def test_finite_rows_are_those_without_nan_and_infinity():
    values = torch.zeros(4, 2, 2)
    values[1, 0, 1], values[2, 1, 0], values[3, 1, 1] = math.nan, math.inf, -math.inf
    assert finite_rows(values).tolist() == [True, False, False, False]
    assert select("abcd", finite_rows(values)) == ["a"]


# ---- Rewards ----


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_a_reward_whose_square_overflows_is_no_reward(value):
    pending = RewardScorer(lambda *_: [1.0, value]).submit(torch.zeros(2, 3, 8, 8), ("a", "b"), (1, 2), "round 0")
    assert pending.rewards_or_nan().isnan().flatten().tolist() == [False, True]
    assert "must be finite in float32" in str(pending.problem())


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_reward_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match=r"reward_weights is \[1.0, (nan|inf)\]; all of them must be finite"):
        RewardScorer([brightness, brightness], [1.0, weight])


# ---- Gradients ----


@both_passes
def test_a_gradient_that_is_not_finite_stops_the_run_before_weights_and_checkpoints_change(
    make_config, one_pass, tmp_path
):
    pipeline = tiny_pipeline()
    armed: list[int] = []

    def overflow(module: Any, inputs: Any, output: Any) -> None:
        if armed and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    pipeline.unet.conv_out.register_forward_hook(overflow)
    config = make_config(one_pass=one_pass, num_train_epochs=3, save_strategy="epoch")
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline)
    rounds: list[dict[str, torch.Tensor]] = []

    begin = trainer._start_updates

    def overflow_in_round_one(rollout: Any) -> None:
        rounds.append(trained_weights(trainer))
        if rollout.round == 1:
            armed.append(1)
        begin(rollout)

    trainer._start_updates = overflow_in_round_one  # type: ignore[method-assign]
    if one_pass:  # gradients are taken while sampling, so the round is known before its rollout
        sample = trainer._policy.sample_with_gradients

        def sampled(*args: Any, **kwargs: Any) -> Any:
            armed.extend([1] * (trainer.state.global_step == 1))
            return sample(*args, **kwargs)

        trainer._policy.sample_with_gradients = sampled  # type: ignore[method-assign]
    with pytest.raises(
        NotFiniteError, match=r"gradient of optimizer step 2 in round 1 is not finite .*norm"
    ) as caught:
        trainer.train()
    assert any("checkpoint-1 is intact" in note for note in caught.value.__notes__)
    assert all(torch.equal(value, rounds[1][name]) for name, value in trained_weights(trainer).items())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def with_gradient(value: float) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.tensor([1.0, value])
    return parameters


def test_the_loss_scaler_of_fp16_may_skip_a_step_but_not_for_ever():
    accelerator = Accelerator(cpu=True)
    overflow, loss = with_gradient(math.inf), torch.tensor(1.0)
    with pytest.raises(NotFiniteError, match=r"of step 1 is not finite \(loss 1.0, gradient norm inf\)"):
        check_update(accelerator, overflow, loss, "step 1")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    check_update(accelerator, overflow, loss, "step 1")  # the scaler skips it and halves the scale
    with pytest.raises(NotFiniteError, match="loss nan"):
        check_update(accelerator, with_gradient(1.0), torch.tensor(math.nan), "step 1")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(NotFiniteError, match="gradient norm inf"):
        check_update(accelerator, overflow, loss, "step 1")
    check_update(accelerator, with_gradient(1.0), loss, "step 1")


def test_no_filter_hides_a_loss_that_is_not_finite(tmp_path):
    assert DDPOConfig(output_dir=str(tmp_path), use_cpu=True).logging_nan_inf_filter is False
    with pytest.raises(ValueError, match="logging_nan_inf_filter is True"):
        DDPOConfig(output_dir=str(tmp_path), use_cpu=True, logging_nan_inf_filter=True)


# ---- Files ----


@pytest.mark.parametrize("use_lora", [True, False])
def test_weights_that_are_not_finite_are_not_saved(make_config, use_lora, tmp_path):
    trainer = DDPOTrainer(make_config(use_lora=use_lora), brightness, PROMPTS, tiny_pipeline())
    trainer.save_model()
    files = {path: path.read_bytes() for path in Path(tmp_path).rglob("*.safetensors")}
    assert files
    name, weight = next((name, p) for name, p in trainer.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    with pytest.raises(NotFiniteError, match="1 of .* not finite"):
        trainer.save_model()
    assert {path: path.read_bytes() for path in Path(tmp_path).rglob("*.safetensors")} == files


def test_an_image_that_is_not_finite_comes_first_and_shifts_no_other():
    images = torch.zeros(3, 3, 2, 2)
    images[0] = math.nan

    def applies_to_one(images: torch.Tensor, prompts: Any, metadata: Any) -> list[Any]:
        return [None, 1.0]

    def fails_for_one(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        return [2.0, math.nan]

    submit = RewardScorer([applies_to_one, lambda images, *_: [5.0, 6.0]]).submit
    rewards = submit(images, "abc", [{}] * 3, "round 0").rewards_or_nan()
    assert torch.equal(rewards.isnan(), torch.tensor([[True, True], [True, False], [False, False]]))
    assert rewards[1:, 1].tolist() == [5.0, 6.0]
    problem = RewardScorer(fails_for_one).submit(images, "abc", [{}] * 3, "round 0").problem()
    assert isinstance(problem, NotFiniteError) and "image 0 of its batch" in str(problem)
