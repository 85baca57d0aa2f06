"""Pushing to the Hub: the real client, in a process of its own, against the Hub of hub_server.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer


SCRIPT = Path(__file__).parents[1] / "push_to_a_hub.py"

SCHEDULER = "scheduler/scheduler_config.json"  # which the card's example loads
ALWAYS = {"README.md", "ddpo_config.json", "environment.json", "metrics.csv", SCHEDULER}
LORA = {*ALWAYS, "pytorch_lora_weights.safetensors"}
CHECKPOINT = {
    "batch_plan.json", "ddpo_config.json", "optimizer.pt", "prompt_statistics.json", "prompts.pt",
    "pytorch_lora_weights.safetensors", "rng_state.pth", "run.json", "scheduler.pt", "trainer_state.json",
}  # fmt: skip


# Written when training ends: a push that is still going on may take it along or not.
REPORT = {"report.html"}


def below(folder: str) -> set[str]:
    return {f"{folder}/{name}" for name in CHECKPOINT}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What push_to_a_hub.py saw. It runs once: the import alone takes seconds."""
    directory = tmp_path_factory.mktemp("hub")
    environment = {
        **os.environ,
        "HF_HOME": str(directory / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # its storage has a protocol of its own
        "HF_TOKEN": "hf_write",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads((directory / "found.json").read_text())


# ---- What is pushed ----


@pytest.mark.parametrize(
    ("strategy", "files"),
    [
        ("end", set()),
        ("every_save", LORA),
        ("checkpoint", LORA | below("last-checkpoint")),
        ("all_checkpoints", LORA | below("checkpoint-1") | below("checkpoint-2")),
    ],
)
def test_each_strategy_leaves_what_it_says_after_training(found, strategy, files):
    assert set(found["strategies"][strategy]["files"]) - REPORT == files


def test_every_save_is_a_commit(found):
    rounds = ["Training in progress, round 1", "Training in progress, round 2"]
    strategies = found["strategies"]
    assert strategies["every_save"]["messages"] == rounds
    both = [message for round in rounds for message in (round, f"{round}, checkpoint")]
    assert strategies["checkpoint"]["messages"] == strategies["all_checkpoints"]["messages"] == both


def test_a_push_during_training_has_the_weights_of_its_round(found):
    assert found["strategies"]["mid_run_weights_are_those_of_the_checkpoint"]


def test_a_run_resumes_from_the_checkpoint_on_the_hub(found):
    assert found["strategies"]["last_checkpoint_is_whole"]
    assert found["strategies"]["resumed_from_the_hub"] == [2, 4, 6]


def test_the_end_pushes_weights_card_settings_and_pictures_and_nothing_unfinished(found):
    pictures = {"reward.png", "before_after.png"}
    gallery = {f"images/{index}-{moment}.png" for index in range(2) for moment in ("before", "after")}
    assert set(found["pictures_card_and_loading"]["files"]) - REPORT == LORA | pictures | gallery


def test_what_was_pushed_gives_the_same_images_to_the_bit_in_plain_diffusers(found):
    seen = found["pictures_card_and_loading"]
    assert seen["same_images"] and seen["other_images_than_before"]


def test_no_token_is_pushed(found):
    assert found["files_with_the_token"] == 0


def test_a_whole_denoiser_is_pushed_and_loaded_as_its_card_says(found):
    seen = found["other_forms"]
    weights = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert set(seen["full_files"]) - REPORT == ALWAYS | weights
    assert seen["full_same_images"]
    assert seen["full_metadata"]["base_model_relation"] == "finetune"
    assert not {"lora", "template:diffusion-lora"} & set(seen["full_metadata"]["tags"])


def test_without_a_loader_in_diffusers_peft_loads_what_was_pushed(found):
    seen = found["other_forms"]
    assert set(seen["peft_files"]) - REPORT == ALWAYS | {"adapter_config.json", "adapter_model.safetensors"}
    assert 'PeftModel.from_pretrained(pipeline.transformer, "me/pixart")' in seen["peft_card"]
    assert seen["peft_difference"] < 1e-6 < seen["peft_change"]


def test_a_branch_of_a_private_repository_is_made_and_filled(found):
    seen = found["private_branch"]
    assert seen["private"]
    assert seen["main"] == [] and set(seen["branch"]) - REPORT == LORA
    assert 'load_lora_weights("me/branch", revision="second-try")' in seen["card"]
    assert seen["again"] == "nothing was raised"


def test_a_run_that_was_not_to_be_pushed_can_be(found):
    seen = found["without_having_said_so"]
    assert seen["refused"].startswith(
        "PushError: The push to late failed: ValueError: The model is to be pushed to 'late'"
    )
    assert "The trained model is in" in seen["refused"]
    assert not seen["made_too_early"]
    assert set(seen["files"]) == {"README.md", "ddpo_config.json", "pytorch_lora_weights.safetensors", SCHEDULER}
    assert seen["private"]
    assert 'load_lora_weights("me/late")' in seen["card"]


def test_the_examples_of_the_page_run(found):
    pictures = {"reward.png", "before_after.png"}
    assert set(found["the_page"]["files"]) > LORA | below("last-checkpoint") | pictures
    assert found["the_page"]["image"] == [64, 64]


def test_the_client_with_xet_commits_as_well(found):
    assert set(found["by_the_newer_protocol"]["files"]) - REPORT == LORA


# ---- The card on the Hub ----


def test_the_card_is_valid_hub_metadata(found):
    metadata = found["pictures_card_and_loading"]["metadata"]  # after ModelCard.validate(), which asks the Hub
    assert metadata["library_name"] == "diffusers"
    assert metadata["base_model"] == "me/base"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert {"trl", "ddpo", "lora", "diffusers"} < set(metadata["tags"])


def test_the_widget_shows_images_that_were_pushed_after_training_and_before(found):
    seen = found["pictures_card_and_loading"]
    captions = {entry["output"]["url"]: entry["text"] for entry in seen["metadata"]["widget"]}
    assert set(captions) <= set(seen["files"])
    assert {captions["images/0-after.png"], captions["images/1-after.png"]} == {"cat", "dog"}
    assert captions["images/0-before.png"] == f"{captions['images/0-after.png']} (before training)"


def test_the_card_shows_pictures_that_were_pushed(found):
    seen = found["pictures_card_and_loading"]
    for picture in ("reward.png", "before_after.png"):
        assert f"]({picture})" in seen["card"] and picture in seen["files"]


def test_five_lines_of_the_card_load_the_model(found):
    seen = found["pictures_card_and_loading"]
    code = seen["card"].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) == 5
    assert seen["same_images_by_the_example"]
    assert seen["image_of_the_example"] == [16, 16]


def test_the_licence_of_the_base_model_goes_with_its_adapter(found):
    metadata = found["pictures_card_and_loading"]["metadata"]
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "tiny-licence"
    assert metadata["license_link"] == "https://huggingface.co/me/base/blob/main/LICENSE.md"


# ---- What is refused before training ----


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "ValueError: The model is to be pushed to 'me/a', but the Hub answers 401"),
        ("wrong token", "ValueError: The model is to be pushed to 'me/a', but the Hub answers 401 (Invalid cred"),
        ("token to read", "ValueError: The model is to be pushed to 'me/a', but the Hub answers 403 (You don't"),
        ("token to read, repository is there", "ValueError: The model is to be pushed to 'me/shown', but the Hub an"),
        ("someone else", "ValueError: The model is to be pushed to 'stabilityai/ours', but the Hub answers 403"),
        ("server error", "ValueError: The model is to be pushed to 'me/a', but the Hub answers 500"),
        (
            "name",
            "ValueError: The model is to be pushed to 'me/my model!', which can't be the name of a repository. Set",
        ),
        ("name of the folder", "ValueError: The model is to be pushed to 'my model', which can't be the name of a"),
    ],
)
def test_what_cannot_be_pushed_is_refused_at_construction(found, case, message):
    assert found["refused_at_construction"][case].startswith(message)


def test_a_refusal_makes_no_repository(found):
    assert "me/a" not in found["refused_at_construction"]["made"]


def test_without_a_network_it_is_said_at_construction(found):
    message = found["without_a_network"]["at construction"]
    assert message.startswith("RuntimeError: The model is to be pushed to 'me/a', but the Hub can't be reached: Conn")


def test_offline_mode_counts_as_no_network(make_config):
    config = make_config(push_to_hub=True, hub_token="hf_any")  # the suite runs with HF_HUB_OFFLINE=1
    with pytest.raises(RuntimeError, match="but the Hub can't be reached: OfflineModeIsEnabled"):
        DDPOTrainer(config, brightness, ["cat"], tiny_pipeline())


# ---- Pushes that fail ----


def test_a_push_that_fails_does_not_stop_training(found):
    seen = found["failing_pushes"]
    assert seen["steps"] == 2
    assert len(seen["warnings"]) == 4  # the model and the checkpoint of two rounds
    assert all(warning.startswith("The push to me/failing failed: HfHubHTTPError") for warning in seen["warnings"])


def test_nothing_local_is_lost_when_pushes_fail(found):
    assert set(found["failing_pushes"]["local"]) - REPORT == LORA | below("checkpoint-1") | below("checkpoint-2")
    assert set(found["without_a_network"]["local"]) >= LORA | below("checkpoint-1")


def test_saving_the_model_succeeds_where_its_push_fails(found):
    (error,) = found["failing_pushes"]["errors_of_saving"]
    assert "The trained model is in" in error


@pytest.mark.parametrize("where", ["failing_pushes", "by_the_newer_protocol"])
def test_a_push_that_was_asked_for_and_fails_says_where_the_model_is(found, where):
    assert re.match(r"PushError: The push to me/\w+ failed: HfHubHTTPError", found[where]["raised"])
    assert "To push it later, call trainer.push_to_hub(), or run: hf upload me/" in found[where]["raised"]
    assert found["without_a_network"]["at the end"].startswith("PushError: The push to me/lost failed: ConnectError")


def test_the_command_that_is_advised_pushes_the_model(found):
    seen = found["failing_pushes"]
    assert seen["advised"].startswith("0 "), seen["advised"]
    assert set(seen["pushed_by_the_advised_command"]) - REPORT == LORA
    assert seen["weights_are_those_on_the_disk"]


def test_pushing_again_succeeds_once_the_hub_is_back(found):
    assert found["failing_pushes"]["messages"][0] == "Upload folder using huggingface_hub"  # of the command
    assert len(found["failing_pushes"]["messages"]) <= 2
