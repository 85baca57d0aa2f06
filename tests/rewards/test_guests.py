"""Reward functions are guests: what one does to its arguments or to global settings is not seen by anything else."""

import os
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.descriptions import own_copy
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rewards.server import ServedFunction


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ("cat", "dog")


def scored(functions: Any, metadata: Any = ({}, {}), timeout: float | None = None) -> list[list[float]]:
    scorer = RewardScorer(functions, max_workers=1, timeout=timeout)
    rewards: list[list[float]] = scorer.submit(IMAGES, PROMPTS, metadata, when="round 0").result().T.tolist()
    return rewards


def writes(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
    """Works in place, as normalization often does, and leaves marks on the metadata."""
    for entries in metadata:
        entries["seen"] = True
        entries["scores"].append(1)
        entries["mask"].fill_(7)
    return brightness(images.sub_(0.5).div_(0.5), prompts, metadata)


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_what_a_function_writes_into_its_arguments_no_other_sees(timeout):
    before = IMAGES.clone()
    metadata: tuple[dict[str, Any], ...] = tuple(
        {"scores": [], "mask": torch.zeros(2), "nested": {"image": Image.new("RGB", (2, 2))}} for _ in "ab"
    )
    first, second = scored([writes, brightness], metadata, timeout)
    assert torch.equal(IMAGES, before)
    assert second == pytest.approx(before.flatten(1).mean(1).tolist())
    assert first == pytest.approx([2 * value - 1 for value in second], abs=1e-5)
    assert all(entries["scores"] == [] and entries["mask"].tolist() == [0, 0] for entries in metadata)
    assert all("seen" not in entries for entries in metadata)


def test_pictures_and_rollouts_show_images_as_they_were_made(make_config):
    def spoil(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        rewards = images.flatten(1).mean(1).tolist()
        images.zero_()
        return rewards

    def run(reward: Any) -> DDPOTrainer:
        trainer = DDPOTrainer(make_config(), reward, ["cat", "dog"], tiny_pipeline(), eval_prompts=["owl", "fox"])
        trainer.train()
        return trainer

    spoiled, clean = run(spoil), run(brightness)
    assert torch.equal(spoiled.rollout.images, clean.rollout.images) and clean.rollout.images.any()
    assert torch.equal(spoiled.generate_samples().images, clean.generate_samples().images)


def test_the_served_function_gets_images_of_its_own_too():
    served = ServedFunction(lambda images, prompts, metadata: images.zero_().flatten(1).sum(1), batch_size=1)
    assert served.score(IMAGES, ("cat", "dog"), ({}, {})) == [0.0, 0.0] and IMAGES[0].any()


def test_a_function_is_called_without_gradients():
    weight = torch.nn.Parameter(torch.ones(()))
    seen = []

    def with_model(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        scores = (images * weight).flatten(1).mean(1)
        seen.append(scores.requires_grad)
        return scores

    async def with_model_later(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return with_model(images, prompts, metadata)

    scored([with_model, with_model_later])
    assert seen == [False, False]


def test_what_a_function_sets_for_torch_is_gone_when_the_next_one_runs():
    state: dict[str, Any] = {}

    def careless(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(True)
        torch.autocast("cpu", torch.bfloat16).__enter__()
        return [0.0, 0.0]

    def next_one(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        state.update(made=torch.zeros(1), grad=torch.is_grad_enabled(), autocast=torch.is_autocast_enabled("cpu"))
        return [1.0, 1.0]

    assert scored([careless, next_one]) == [[0.0, 0.0], [1.0, 1.0]]
    assert state["made"].dtype == torch.float32 and state["made"].device.type == "cpu"
    assert state["grad"] is False and state["autocast"] is False
    assert torch.get_default_dtype() == torch.float32


def test_what_a_function_sets_for_the_process_is_put_back(monkeypatch, tmp_path):
    """Relative paths of a run are meant from where it was started; the policy computes as precisely as before."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_float32_matmul_precision()
    other = {"highest": "medium", "medium": "high", "high": "medium"}[before]

    def moves(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        os.chdir("/")
        torch.set_float32_matmul_precision(other)
        return [0.0, 0.0]

    scored([moves])
    assert os.getcwd() == str(tmp_path) and torch.get_float32_matmul_precision() == before


def test_a_default_dtype_comes_back_when_the_last_of_several_functions_is_done():
    """One that loads a model needs its own until then."""
    found = []

    def quick(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        time.sleep(0.05)
        return [0.0, 0.0]

    def loads(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        torch.set_default_dtype(torch.float16)
        time.sleep(0.3)
        found.append(torch.zeros(1).dtype)
        return [0.0, 0.0]

    scorer = RewardScorer([quick, loads], max_workers=2)
    scorer.submit(IMAGES, PROMPTS, ({}, {}), when="round 0").result()
    assert found == [torch.float16] and torch.get_default_dtype() == torch.float32


def run_of_random_prompts(config: DDPOConfig, reward: Any) -> list[str]:
    drawn: list[str] = []

    def prompts() -> tuple[str, dict[str, Any]]:
        drawn.append(f"{random.choice('abcdefgh')}{np.random.randint(9)}{torch.randint(9, ()).item()}")
        return drawn[-1], {}

    DDPOTrainer(config, reward, prompts, tiny_pipeline(), eval_prompts=["owl"]).train()
    return drawn


def test_a_function_that_seeds_or_draws_random_numbers_does_not_change_the_prompts(make_config):
    numbers = []

    def seeds(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return brightness(images, prompts, metadata)

    def draws(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        numbers.append((random.random(), np.random.random(), torch.rand(()).item()))
        return brightness(images, prompts, metadata)

    config = make_config(num_train_epochs=3, eval_strategy="epoch", eval_rounds=2, num_inference_steps=2)
    quiet, seeded, drawing = (run_of_random_prompts(config, reward) for reward in (brightness, seeds, draws))
    assert quiet == seeded == drawing
    assert len({*quiet}) > 16  # of 24: seeded again in each round they would be 8
    assert len({*numbers}) > len(numbers) // 2  # and what draws does not draw the same in each


def test_only_containers_and_numbers_are_copied():
    class Model:
        pass

    model = Model()
    value = {"list": [1, {"deep": np.zeros(2)}], "pair": (torch.zeros(1), "text"), "model": model, "none": None}
    copy = own_copy(value)
    copy["list"][1]["deep"] += 1
    copy["pair"][0].fill_(1)
    assert value["list"][1]["deep"].tolist() == [0, 0] and value["pair"][0].item() == 0  # type: ignore[index]
    assert copy["model"] is model and copy["pair"][1] == "text" and copy["none"] is None


@pytest.mark.skipif(torch.accelerator.device_count() < 1, reason="needs an accelerator")
def test_a_function_runs_on_the_images_own_device():
    last = torch.accelerator.device_count() - 1
    seen = []

    def where(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
        seen.append((images.device.index, torch.accelerator.current_device_index()))
        return [0.0] * len(images)

    device = torch.device(torch.accelerator.current_accelerator().type, last)  # type: ignore[union-attr]
    RewardScorer(where).submit(IMAGES.to(device), PROMPTS, ({}, {}), when="round 0").result()
    assert seen == [(last, last)]
