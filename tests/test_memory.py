"""What is kept where: recorded steps and networks leave the GPU on demand, and the plan says what a round takes."""

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.doctor import storage_bytes
from ddpo_trl.types import Step


PROMPTS = ["cat", "dog", "owl"]


def weights(trainer: DDPOTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]


OFFLOADING = ["offload_rollout", "offload_vae", "offload_text_encoders"]


@pytest.mark.parametrize(
    ("option", "one_pass"),
    [*((option, one_pass) for option in OFFLOADING for one_pass in (True, False)), ("gradient_checkpointing", False)],
)
def test_what_saves_memory_changes_no_result(make_config, option):
    runs = []
    for config in (make_config(), make_config(**{option: True})):
        trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
        trainer.train()
        runs.append(weights(trainer))
    for plain, saving in zip(*runs, strict=True):
        assert (
            torch.allclose(plain, saving, atol=1e-6)
            if option == "gradient_checkpointing"
            else torch.equal(plain, saving)
        )


def test_an_offloaded_rollout_is_on_the_cpu_and_its_micro_batches_where_the_advantages_are(make_config, monkeypatch):
    devices = []
    original = Step.to

    def to(step: Step, device: str) -> Step:
        devices.append(device)
        return original(step, device)

    monkeypatch.setattr(Step, "to", to)
    trainer = DDPOTrainer(make_config(one_pass=False, offload_rollout=True), brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    assert devices == ["cpu"] * 4 * 2  # four steps of two batches
    elsewhere = dataclasses.replace(trainer.rollout, advantages=trainer.rollout.advantages.to("meta"))
    batch = elsewhere.transition([0, 5], step=1, on_policy=True)
    assert {batch.latents.device.type, batch.next_latents.device.type, batch.log_probs.device.type} == {"meta"}


def test_the_autoencoder_is_at_hand_only_while_images_are_made(make_config):
    pipeline = tiny_pipeline()
    moves = []
    original = pipeline.vae.to

    def to(device: Any, dtype: Any = None) -> Any:
        moves.append(str(device))
        return original(device, dtype)

    pipeline.vae.to = to
    trainer = DDPOTrainer(make_config(offload_vae=True, num_sample_batches=1), brightness, PROMPTS, pipeline)
    moves.clear()  # the trial at construction
    trainer.train()
    assert moves == ["cpu", "cpu"]  # to the denoiser's device, which is the CPU here, and back
    trainer.generate_samples(["cat"])
    assert len(moves) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pipeline_inputs": ["ip_adapter_image"]}, "offload_vae is True, but .* encodes images in training too")],
)
def test_an_autoencoder_that_training_needs_is_not_sent_away(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        pairs = [("cat", dict.fromkeys(settings["pipeline_inputs"]))]
        DDPOTrainer(make_config(offload_vae=True, **settings), brightness, pairs, tiny_pipeline())


@pytest.mark.parametrize(("option", "method"), [("vae_slicing", "enable_slicing"), ("vae_tiling", "enable_tiling")])
def test_images_are_those_of_the_pipeline_with_its_own_option(make_config, option, method):
    plain, pipeline = tiny_pipeline(), tiny_pipeline()
    decoded: list[int] = []
    pipeline.vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(len(output)))
    for vae in (plain.vae, pipeline.vae):
        vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 8  # latents are 8 by 8
    trainer = DDPOTrainer(make_config(**{option: True}), brightness, PROMPTS, pipeline)
    decoded.clear()
    images = trainer.generate_samples(["cat", "dog"]).images
    getattr(plain.vae, method)()
    assert decoded == ([1, 1] if option == "vae_slicing" else [2] * 9)
    expected = DDPOTrainer(make_config(), brightness, PROMPTS, plain).generate_samples(["cat", "dog"]).images
    assert torch.equal(images, expected)


@pytest.mark.parametrize("option", ["vae_slicing", "vae_tiling"])
def test_an_option_that_the_autoencoder_does_not_have_is_refused(make_config, option):
    pipeline = tiny_pipeline()
    del vars(pipeline.vae)[option.replace("vae", "use")]
    with pytest.raises(ValueError, match=f"{option} is True, but .* has AutoencoderKL, which can't"):
        DDPOTrainer(make_config(**{option: True}), brightness, PROMPTS, pipeline)


@pytest.mark.parametrize("settings", [{}, {"sde_window_size": 2}, {"train_timestep_range": [0.0, 0.5]}])
def test_the_plan_states_the_memory_of_a_round(make_config, settings):
    trainer = DDPOTrainer(make_config(one_pass=False, **settings), brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    states = [
        tensor
        for batch in trainer.rollout.batches
        for step in batch.steps.values()
        for tensor in (step.latents, step.next_latents)
    ]
    assert trainer.plan.rollout_bytes == storage_bytes(states)
    assert "memory of the recorded steps" in str(trainer.plan)


def test_an_8_bit_optimizer_trains_and_resumes_to_the_bit(make_config, tmp_path):
    pytest.importorskip("bitsandbytes")  # not installed for development: it talks when it is imported

    def trainer(directory: str, rounds: int) -> DDPOTrainer:
        config = make_config(
            output_dir=str(tmp_path / directory),
            optim="adamw_bnb_8bit",
            num_train_epochs=rounds,
            save_strategy="epoch",
            lr_scheduler_type="constant",
        )
        adapter = LoraConfig(r=256, target_modules=["to_q", "to_v"])  # smaller tensors are kept in 32 bits
        return DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), peft_config=adapter)

    whole, resumed = trainer("whole", 2), trainer("parts", 2)
    whole.train()
    trainer("parts", 1).train()
    resumed.train(resume_from_checkpoint=True)
    assert {state["state1"].dtype for state in whole.optimizer.state.values()} == {torch.uint8}
    assert all(torch.equal(left, right) for left, right in zip(weights(whole), weights(resumed), strict=True))
