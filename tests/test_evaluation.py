"""Evaluation: images as users get them, the figures that are logged, and what may depend on them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from conftest import brightness, in_both_passes, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.evaluation.evaluator import Samples, check_evaluation, diversity, metric_names, repeated
from ddpo_trl.seeding import Stream, derived_seed


PROMPTS = ["cat", "dog", "owl"]
REPEATED = ["cat", "dog", "cat", "owl", "cat", "dog"]


def darkness(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> torch.Tensor:
    return -brightness(images, tuple(prompts), tuple(metadata))


def redness(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> torch.Tensor:
    return images[:, 0].flatten(1).mean(1)


def corner(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> torch.Tensor:
    """One pixel, which noise moves more than a mean."""
    return images[:, 0, 0, 0]


def images_of_plain_diffusers(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 42, **kwargs: Any
) -> torch.Tensor:
    """What a user gets from the pipeline for the evaluation's seeds and the settings of `make_config`."""
    generators = [
        torch.Generator().manual_seed(derived_seed(seed, Stream.EVALUATION, index)) for index in range(len(prompts))
    ]
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", **kwargs}
    return pipeline(prompts, generator=generators, **settings).images


def trainer_for(config: DDPOConfig, reward_fn: Any = brightness, **kwargs: Any) -> DDPOTrainer:
    return DDPOTrainer(config, reward_fn, PROMPTS, tiny_pipeline(), **{"eval_prompts": PROMPTS, **kwargs})


def lora_weights(trainer: DDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def evaluations(trainer: DDPOTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "eval_reward" in log]


# ---- Images ----


def test_evaluation_images_are_those_of_the_plain_pipeline(make_config, tmp_path):
    trainer = trainer_for(make_config(per_device_sample_batch_size=8, num_sample_batches=1))
    assert torch.equal(trainer.generate_samples().images, images_of_plain_diffusers(tiny_pipeline(), PROMPTS))
    trainer.train()
    trainer.save_model(tmp_path / "lora")
    user = tiny_pipeline()
    user.load_lora_weights(tmp_path / "lora")
    assert torch.allclose(trainer.generate_samples().images, images_of_plain_diffusers(user, PROMPTS), atol=1e-6)


def test_generate_samples_gives_the_same_images_for_the_same_weights_and_scores_them(make_config):
    trainer = trainer_for(make_config(), eval_prompts=["cat"] * 5)
    first, again = trainer.generate_samples(), trainer.generate_samples()
    assert first.prompts == ["cat"] * 5
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images[0], first.images[1])  # other seeds
    assert torch.allclose(first.rewards[:, 0], first.images.flatten(1).mean(1).double())
    trainer.train()
    assert not torch.equal(first.images, trainer.generate_samples().images)
    assert trainer.generate_samples(["dog"]).prompts == ["dog"]


def test_samples_without_prompts_are_refused(make_config):
    trainer = trainer_for(make_config(), eval_prompts=None)
    with pytest.raises(ValueError, match="`eval_prompts`"):
        trainer.generate_samples()


# ---- Figures ----


def test_the_rewards_are_those_of_images_that_plain_diffusers_makes(make_config):
    config = make_config(reward_weights=[2.0, -1.0])
    metrics = trainer_for(config, [brightness, redness], eval_prompts=REPEATED).evaluate()
    images = images_of_plain_diffusers(tiny_pipeline(), REPEATED).double()
    bright, red = images.flatten(1).mean(1), images[:, 0].flatten(1).mean(1)
    expected = {
        "eval_reward": (2 * bright - red).mean(),
        "eval_reward_std": (2 * bright - red).std(correction=0),
        "eval_rewards/brightness/mean": bright.mean(),
        "eval_rewards/brightness/std": bright.std(correction=0),
        "eval_rewards/redness/mean": red.mean(),
        "eval_rewards/redness/std": red.std(correction=0),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, abs=1e-6
    )


def test_the_sde_gap_is_that_between_diffusers_ddim_with_and_without_noise(make_config):
    metrics = trainer_for(make_config(), corner).evaluate()
    ode, sde = (
        images_of_plain_diffusers(tiny_pipeline(), PROMPTS, eta=eta)[:, 0, 0, 0].mean().item() for eta in (0.0, 1.0)
    )
    assert abs(sde - ode) > 1e-3
    assert metrics["eval_reward"] == pytest.approx(ode, abs=1e-6)
    assert metrics["eval_reward_sde_gap"] == pytest.approx(sde - ode, abs=1e-6)


@pytest.mark.parametrize("strategy, step_of_round", [("fixed", [0, 0, 0]), ("progressive", [0, 1, 2])])
def test_the_sde_gap_has_noise_where_the_last_round_had_it(make_config, strategy, step_of_round):
    config = make_config(
        sde_window_size=1, sde_window_strategy=strategy, sde_window_interval=1, num_train_epochs=3,
        eval_strategy="epoch", learning_rate=0.0,
    )  # fmt: skip
    trainer = trainer_for(config, corner)
    trainer.train()
    seeds = [derived_seed(42, Stream.EVALUATION, index) for index in range(3)]
    context = trainer._policy.context(PROMPTS, [{}] * 3, seeds)
    ode = trainer._policy.generate(context)[:, 0, 0, 0].mean().item()
    for evaluation, step in zip(evaluations(trainer), step_of_round, strict=True):
        sde = trainer._policy.sample(context, stochastic=[step]).images[:, 0, 0, 0].mean().item()
        assert evaluation["eval_reward_sde_gap"] == pytest.approx(sde - ode, abs=1e-6)


def test_held_out_rewards_are_scored_in_evaluation_only_and_logged_by_name(make_config):
    batches: list[int] = []

    def held_out(images, prompts, metadata):
        batches.append(len(images))
        return 10 * redness(images, prompts, metadata)

    config = make_config(num_train_epochs=2, eval_strategy="epoch", eval_rounds=2)
    trainer = trainer_for(config, eval_reward_fn=[held_out, brightness])
    trainer.train()
    assert batches == [3]  # the evaluation prompts, once
    (log,) = evaluations(trainer)
    images = trainer.generate_samples().images.double()
    assert log["eval_rewards/held_out/mean"] == pytest.approx(10 * images[:, 0].mean().item(), abs=1e-5)
    assert log["eval_rewards/held_out/std"] == pytest.approx(
        10 * images[:, 0].flatten(1).mean(1).std(correction=0).item(), abs=1e-5
    )
    assert log["eval_rewards/brightness_2/mean"] == log["eval_rewards/brightness/mean"] == log["eval_reward"]
    assert not any("held_out" in name for entry in trainer.state.log_history if "reward" in entry for name in entry)


def test_one_held_out_reward_needs_no_list(make_config):
    assert "eval_rewards/darkness/mean" in trainer_for(make_config(), eval_reward_fn=darkness).evaluate()


def test_diversity_is_the_mean_pairwise_distance_within_prompts():
    black, grey, white = (torch.full((1, 3, 2, 2), value) for value in (0.0, 0.5, 1.0))
    half = torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2)  # half of the pixels are white: RMS √½ from black
    images = torch.cat([black, white, white, grey, half, black])
    # a: black-white 1, black-grey 0.5, white-grey 0.5, mean 2/3; b: half-black √½; c occurs once
    prompts = ["a", "c", "a", "a", "b", "b"]
    assert diversity(images[rows] for rows in repeated(prompts)) == pytest.approx((2 / 3 + 0.5**0.5) / 2)
    assert diversity([torch.cat([white, white])]) == 0.0
    assert diversity(images[rows] for rows in repeated(["a", "b", "c", "d", "e", "f"])) is None


def test_diversity_is_logged_if_a_prompt_is_given_twice(make_config):
    repeated, single = (trainer_for(make_config(), eval_prompts=prompts).evaluate() for prompts in (REPEATED, PROMPTS))
    cats, dogs = (
        images_of_plain_diffusers(tiny_pipeline(), REPEATED)[[i for i, p in enumerate(REPEATED) if p == prompt]]
        for prompt in ("cat", "dog")
    )
    pairs = [(cats[0], cats[1]), (cats[0], cats[2]), (cats[1], cats[2])]
    of_cats = sum((left - right).square().mean().sqrt().item() for left, right in pairs) / 3
    of_dogs = (dogs[0] - dogs[1]).square().mean().sqrt().item()
    assert repeated["eval_diversity"] == pytest.approx((of_cats + of_dogs) / 2, abs=1e-6)
    assert "eval_diversity" not in single


def test_figures_do_not_depend_on_the_sample_batch(make_config):
    one, three = (
        trainer_for(make_config(per_device_sample_batch_size=size, num_sample_batches=8), eval_prompts=REPEATED)
        for size in (1, 4)
    )
    assert one.evaluate() == pytest.approx(three.evaluate(), abs=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS, REPEATED])
def test_the_figures_names_are_known_beforehand(make_config, prompts):
    trainer = trainer_for(make_config(), [brightness, redness], eval_prompts=prompts, eval_reward_fn=[darkness])
    names = metric_names(["brightness", "redness", "darkness"], prompts)
    assert list(trainer.evaluate()) == [*names, "epoch"]  # which Trainer adds
    assert all(name.startswith("eval/") for name in rewrite_logs(dict.fromkeys(names, 0.0)))  # what trackers show
    renamed = trainer.evaluate(["dog"], metric_key_prefix="test")
    assert all(name.startswith("test_") for name in renamed if name != "epoch")


# ---- When ----


def rounds_evaluated(trainer: DDPOTrainer) -> list[float]:
    return [log["epoch"] for log in evaluations(trainer)]


@pytest.mark.parametrize(
    "every, rounds, expected", [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (3, 2, [2]), (2, 4, [2, 4])]
)
def test_every_so_many_rounds_and_the_last_one_are_evaluated(make_config, every, rounds, expected):
    config = make_config(eval_strategy="epoch", eval_rounds=every, num_train_epochs=rounds, num_mini_batches=2)
    trainer = trainer_for(config)
    trainer.train()
    assert rounds_evaluated(trainer) == expected


class AskForEvaluation(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def test_a_callback_may_ask_for_more_evaluations(make_config):
    config = make_config(eval_strategy="epoch", eval_rounds=3, num_train_epochs=3)
    trainer = trainer_for(config, callbacks=[AskForEvaluation()])
    trainer.train()
    assert rounds_evaluated(trainer) == [1, 2, 3]


@in_both_passes
def test_evaluation_leaves_training_alone(make_config, one_pass):
    settings = {"num_train_epochs": 3, "num_mini_batches": 1 if one_pass else 2}
    plain, evaluated = (
        trainer_for(make_config(**settings, **more), eval_reward_fn=redness)
        for more in ({}, {"eval_strategy": "epoch", "eval_on_start": True})
    )
    plain.train()
    evaluated.train()
    assert len(evaluations(evaluated)) == 4
    expected = lora_weights(plain)
    assert all(torch.equal(weight, expected[name]) for name, weight in lora_weights(evaluated).items())
    rewards = [[log["reward"] for log in t.state.log_history if "reward" in log] for t in (plain, evaluated)]
    assert rewards[0] == rewards[1]


# ---- Early stopping and the best checkpoint ----


class WeightsAtEvaluations(TrainerCallback):
    def __init__(self):
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def assert_best_is_back(trainer: DDPOTrainer, best: dict[str, torch.Tensor], last: dict[str, torch.Tensor]) -> None:
    weights = lora_weights(trainer)
    assert all(torch.equal(weight, best[name]) for name, weight in weights.items())
    assert any(not torch.equal(weight, last[name]) for name, weight in weights.items())


# Eight samples per round are few: with this seed the first round's evaluation is the brightest.
FALLING = 6

KEEP_BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


def test_a_held_out_reward_that_falls_stops_the_run_and_the_best_weights_are_back(make_config, tmp_path):
    """Training for darkness lowers the held-out brightness: the first round is the best, patience ends the third."""
    config = make_config(
        **KEEP_BEST, metric_for_best_model="eval_rewards/brightness/mean", num_train_epochs=10, num_ppo_epochs=2,
        seed=FALLING,
    )  # fmt: skip
    recorder = WeightsAtEvaluations()
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2), recorder]
    trainer = trainer_for(config, darkness, eval_reward_fn=[brightness], callbacks=callbacks)
    trainer.train()
    first, second, third = [log["eval_rewards/brightness/mean"] for log in evaluations(trainer)]
    assert first > second and first > third
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert_best_is_back(trainer, recorder.weights[0], recorder.weights[-1])
    assert trainer.evaluate()["eval_rewards/brightness/mean"] == first
    images = trainer.generate_samples().images
    user = tiny_pipeline()
    trainer.save_model(tmp_path / "best")
    user.load_lora_weights(tmp_path / "best")
    assert torch.allclose(images, images_of_plain_diffusers(user, PROMPTS, FALLING), atol=1e-6)


def test_early_stopping_works_on_every_figure(make_config, tmp_path):
    """Which way a figure goes is seen in a run without a stop; going the other way is then what is wished for."""
    settings = {**KEEP_BEST, "num_train_epochs": 3}
    kwargs = {"eval_prompts": REPEATED, "eval_reward_fn": [redness]}
    free = trainer_for(make_config(**settings, output_dir=str(tmp_path / "free")), **kwargs)
    free.train()
    for metric in ("reward_std", "eval_reward_sde_gap", "eval_rewards/redness/mean"):
        name = "eval_" + metric.removeprefix("eval_")
        first, second, _ = [log[name] for log in evaluations(free)]
        recorder = WeightsAtEvaluations()
        config = make_config(
            **settings, metric_for_best_model=metric, greater_is_better=first > second,
            output_dir=str(tmp_path / name.replace("/", " ")),
        )  # fmt: skip
        stopped = trainer_for(config, callbacks=[EarlyStoppingCallback(), recorder], **kwargs)
        stopped.train()
        assert [log[name] for log in evaluations(stopped)] == [first, second], metric
        assert_best_is_back(stopped, recorder.weights[0], recorder.weights[1])


def test_the_best_is_found_among_evaluated_rounds_only(make_config):
    config = make_config(**KEEP_BEST, eval_rounds=2, num_train_epochs=5, greater_is_better=False)
    recorder = WeightsAtEvaluations()
    trainer = trainer_for(config, callbacks=[recorder])
    trainer.train()
    rewards = [log["eval_reward"] for log in evaluations(trainer)]
    best = rewards.index(min(rewards))
    assert len(rewards) == 3
    assert trainer.state.best_global_step == [2, 4, 5][best]
    assert all(torch.equal(weight, recorder.weights[best][name]) for name, weight in lora_weights(trainer).items())


def test_save_strategy_best_saves_better_rounds_only_and_they_are_resumable(make_config, tmp_path):
    settings = {
        "eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "eval_rewards/brightness/mean",
        "load_best_model_at_end": True, "num_train_epochs": 3, "seed": FALLING,
    }  # fmt: skip
    recorder = WeightsAtEvaluations()
    trainer = trainer_for(make_config(**settings), darkness, eval_reward_fn=brightness, callbacks=[recorder])
    trainer.train()
    values = [log["eval_rewards/brightness/mean"] for log in evaluations(trainer)]
    assert values[0] == max(values)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert_best_is_back(trainer, recorder.weights[0], recorder.weights[-1])
    resumed = trainer_for(make_config(**settings), darkness, eval_reward_fn=brightness)
    resumed.train(resume_from_checkpoint=True)
    assert [log["eval_rewards/brightness/mean"] for log in evaluations(resumed)] == values
    assert [log["epoch"] for log in resumed.state.log_history if "reward" in log] == [1, 2, 3]  # with its own round
    assert_best_is_back(resumed, recorder.weights[0], recorder.weights[-1])


# ---- Mistakes ----


@pytest.mark.parametrize(
    "settings, kwargs, message",
    [
        ({}, {"eval_prompts": None}, "eval_strategy is 'epoch', but there are no prompts.* give `eval_prompts`"),
        (
            {"metric_for_best_model": "loss"},
            {},
            "metric_for_best_model is 'loss', which an evaluation does not give; choose one of eval_reward, ",
        ),
        ({"metric_for_best_model": "eval_diversity"}, {}, r"is 'eval_diversity', .*needs a prompt given twice"),
        ({"metric_for_best_model": "rewards/redness/mean"}, {}, "one of .*eval_rewards/brightness/mean"),
        ({}, {"eval_reward_fn": []}, "eval_reward_fn is an empty list"),
        ({}, {"eval_reward_fn": [brightness, 3]}, r"eval_reward_fn\[1\] is 3, which can't be called"),
        ({}, {"eval_reward_fn": lambda images: [0.0]}, r"eval_reward_fn\[0\] .* is called with three"),
        ({"try_reward_fn": True}, {"eval_reward_fn": lambda i, p, m: [0.0]}, "returned 1 values for 2 images"),
    ],
)
def test_a_mistake_is_refused_at_construction_with_its_remedy(make_config, settings, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trainer_for(make_config(eval_strategy="epoch", **settings), **kwargs)


class OwnFigures(DDPOTrainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_loss": 0.0}


def test_an_overridden_evaluate_may_have_figures_of_its_own(make_config):
    config = make_config(**KEEP_BEST, metric_for_best_model="loss")
    trainer = OwnFigures(config, brightness, PROMPTS, tiny_pipeline(), eval_prompts=PROMPTS)
    trainer.train()
    assert trainer.state.best_metric == 0.0


def test_without_evaluation_nothing_of_it_is_checked(make_config):
    check_evaluation(make_config(metric_for_best_model="loss"), None, [])


def sometimes_nan(images, prompts, metadata):
    values = redness(images, prompts, metadata)
    return [float("nan") if prompt == "owl" else value for prompt, value in zip(prompts, values, strict=True)]


def test_an_invalid_reward_ends_the_evaluation_by_default(make_config):
    trainer = trainer_for(make_config(), eval_prompts=["cat"])
    trainer.scorer.functions = [sometimes_nan]
    with pytest.raises(ValueError, match="returned nan for image 1.* 'owl'"):
        trainer.evaluate(["cat", "owl"])


def test_images_without_a_valid_reward_are_left_out_if_they_are_dropped(make_config, caplog):
    trainer = trainer_for(make_config(on_invalid_reward="drop"))
    trainer.evaluate()
    assert "left out" not in caplog.text
    trainer.scorer.functions = [sometimes_nan]
    metrics = trainer.evaluate()
    assert "1 of 3 images of an evaluation have no valid reward and are left out. The first reason: " in caplog.text
    cat, dog, _ = images_of_plain_diffusers(tiny_pipeline(), PROMPTS)[:, 0].flatten(1).mean(1).tolist()
    assert metrics["eval_reward"] == pytest.approx((cat + dog) / 2, abs=1e-6)
    assert metrics["eval_reward_std"] == pytest.approx(abs(cat - dog) / 2, abs=1e-6)


def test_samples_are_shown_by_their_figures():
    samples = Samples(["a", "b"], torch.zeros(2, 3, 8, 16), torch.tensor([[1.0], [2.0]]))
    assert repr(samples) == "Samples of 2 prompts: images of 3x8x16, mean rewards 1.5"
