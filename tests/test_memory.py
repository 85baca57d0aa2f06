"""What is kept where: recorded steps and networks leave the GPU on demand, and the plan says what a round takes."""

import dataclasses
import gc
import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.checks.doctor import storage_bytes
from ddpo_trl.policy.embedding_cache import EmbeddingCache
from ddpo_trl.policy.per_sample_gradients import Watch, trained_layers
from ddpo_trl.policy.records import Step, steps_to
from ddpo_trl.policy.sampling import differentiate
from ddpo_trl.rollout.loader import RolloutLoader
from test_trainer import gradients_of_a_round, relative_difference


PROMPTS = ["cat", "dog", "owl"]


def weights(trainer: DDPOTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]


OFFLOADING = ["offload_rollout", "offload_vae", "offload_text_encoders"]


@pytest.mark.parametrize(
    ("option", "one_pass"),
    [(option, one_pass) for option in [*OFFLOADING, "gradient_checkpointing"] for one_pass in (True, False)],
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

    def to(steps: Any, device: str) -> dict[int, Step]:
        devices.append(device)
        return steps_to(steps, device)

    monkeypatch.setattr("ddpo_trl.policy.sampling.steps_to", to)
    trainer = DDPOTrainer(make_config(one_pass=False, offload_rollout=True), brightness, PROMPTS, tiny_pipeline())
    devices.clear()  # the trial at construction
    trainer.train()
    assert devices == ["cpu"] * 2  # two batches
    elsewhere = dataclasses.replace(trainer.rollout, advantages=trainer.rollout.advantages.to("meta"))
    batch = elsewhere.transition([0, 5], step=1, on_policy=True)
    assert {batch.latents.device.type, batch.next_latents.device.type, batch.log_probs.device.type} == {"meta"}


def test_a_state_that_two_steps_share_is_one_tensor_on_another_device_too(make_config):
    """ "meta" stands for the GPU: all else on the CPU is moved by doing nothing."""
    trainer = DDPOTrainer(make_config(one_pass=False), brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    moved = steps_to(trainer.rollout.batches[0].steps, "meta")
    states = [tensor for step in moved.values() for tensor in (step.latents, step.next_latents)]
    assert {tensor.device.type for tensor in states} == {"meta"}
    assert len({id(tensor) for tensor in states}) == 4 + 1  # of four steps


@pytest.mark.parametrize("one_pass", [None, False])
def test_the_rollout_before_is_gone_when_the_next_is_sampled(make_config, monkeypatch, one_pass):
    begun: list[weakref.ref[Any]] = []
    alive = []
    sample = RolloutLoader._sample

    def counted(loader: RolloutLoader, *args: Any) -> Any:
        gc.collect()
        alive.append([reference() is not None for reference in begun])
        batches, pending = sample(loader, *args)
        begun.extend(weakref.ref(batch) for batch in batches)
        return batches, pending

    monkeypatch.setattr(RolloutLoader, "_sample", counted)
    config = make_config(
        one_pass=one_pass, num_train_epochs=3, log_images_rounds=1, num_logged_images=1, save_strategy="epoch"
    )
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
    trainer.train()
    assert alive == [[], [False] * 2, [False] * 4]
    assert len(trainer.rollout.batches) == 2  # the last one is there to be looked at


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_trial_at_construction_has_no_more_samples_than_a_batch(make_config, batch_size):
    rows: list[int] = []
    scored: list[int] = []
    decoded: list[int] = []
    autocast: set[bool] = set()
    pipeline = tiny_pipeline()

    def noted(module: Any, inputs: Any) -> None:
        rows.append(len(inputs[0]))
        autocast.add(torch.is_autocast_enabled("cpu"))

    def reward(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        scored.append(len(images))
        return brightness(images, prompts, metadata)

    pipeline.unet.register_forward_pre_hook(noted)
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(len(inputs[0])))
    sizes = {"per_device_sample_batch_size": batch_size, "per_device_train_batch_size": batch_size}
    config = make_config(one_pass=None, bf16=True, try_reward_fn=True, **sizes)
    trainer = DDPOTrainer(config, reward, PROMPTS, pipeline)
    assert trainer.plan.one_pass
    assert max(rows) == 2 * min(batch_size, 2)  # with guidance
    assert scored == [min(batch_size, 2)] and decoded == [1]
    assert autocast == {True}
    trainer.train()


def with_memory_for(samples: float, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run out of memory in forward passes of more samples, if their activations are kept."""
    forward = pipeline.unet.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and len(args[0]) > 2 * samples:  # with guidance
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.unet, "forward", limited)


@pytest.mark.parametrize("insisting", [None, True])
def test_a_trial_that_runs_out_of_memory_means_two_passes_with_the_reason(make_config, monkeypatch, insisting):
    pipeline = tiny_pipeline()
    with monkeypatch.context() as during_construction:
        with_memory_for(0, pipeline, during_construction)
        config = make_config(one_pass=insisting)
        reason = "a step of one sample with gradients needs more memory than there is (CUDA out of memory. Tried to al"
        if insisting:
            with pytest.raises(ValueError, match=re.escape(f"one_pass is True, but {reason}")):
                DDPOTrainer(config, brightness, PROMPTS, pipeline)
            return
        trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline)
    assert not trainer.plan.one_pass and reason in str(trainer.plan)
    trainer.train()


@pytest.mark.parametrize("memory, part", [(1, 1), (2, 2), (3, 2), (4, None)])
def test_one_pass_runs_in_the_largest_parts_that_fit(make_config, monkeypatch, memory, part):
    """Of batches of 4 samples; a lack of memory is an error on a GPU, and pretended to be one here."""
    monkeypatch.setattr("ddpo_trl.update.one_pass.reports_shortage", lambda device: True)
    pipeline = tiny_pipeline()
    with_memory_for(memory, pipeline, monkeypatch)
    # Raw rewards: normalization divides by their spread, 7e-4 here, and magnifies what batch sizes change by rounding.
    settings = {"max_grad_norm": 0.0, "advantage_normalization": "none"}
    config = make_config(**settings)
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline)
    assert trainer.plan.one_pass and trainer.plan.samples_per_part == part
    assert (f"in parts of {part} samples" in str(trainer.plan)) == (part is not None)
    two_passes = gradients_of_a_round(make_config(one_pass=False, **settings))
    assert relative_difference(gradients_of_a_round(config, pipeline), two_passes) < 1e-5


def test_one_pass_leaves_room_for_what_a_run_keeps(make_config, monkeypatch):
    """The gradients of a round's other samples, the sum of all, and AdamW's two states."""
    reserved: list[int] = []
    empty = torch.empty

    def noted(*size: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") == torch.uint8:
            reserved.append(*size)
        return empty(*size, **kwargs)

    monkeypatch.setattr("ddpo_trl.update.one_pass.reports_shortage", lambda device: True)
    monkeypatch.setattr(torch, "empty", noted)
    for offload, others in ((False, 4), (True, 0)):
        config = make_config(offload_rollout=offload, num_sample_batches=2)  # of 4 samples
        trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
        assert reserved.pop() == (others + 3) * trainer.plan.gradient_bytes


def test_one_pass_holds_no_outputs_of_layers_that_pytorch_would_not_hold(make_config):
    """Those of LoRA's second factor, which are as wide as the layer, are added to the layer's own and gone."""
    outputs: list[weakref.ref[Any]] = []
    alive: list[int] = []
    policy = DDPOTrainer(make_config(), brightness, PROMPTS, tiny_pipeline())._policy
    layers = trained_layers(policy.denoiser)
    watch = Watch(layers, lambda call, grad: alive.append(sum(one() is not None for one in outputs)))

    def remember(module: Any, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(weakref.ref(output))

    def take(log_probs: torch.Tensor) -> None:
        watch.backward(log_probs.sum())

    context = policy.context(PROMPTS[:2], [{}] * 2, [0, 1])
    with watch.watching():
        wide = [layer for layer in layers if layer.weight.shape[0] > layer.weight.shape[1]]
        hooks = [layer.register_forward_hook(remember) for layer in wide]
        differentiate(policy.runner, context, 0, take)
        for hook in hooks:
            hook.remove()
    assert len(alive) > 10  # calls that a gradient reached
    assert len(outputs) == len(layers) / 2
    assert max(alive) <= 1


def moved_parts(pipeline: Any) -> list[str]:
    """Names of the pipeline's networks, as they are moved."""
    moves: list[str] = []
    for name in ("text_encoder", "unet"):
        module = pipeline.components[name]

        def to(*args: Any, own: Any = module, to: Any = module.to, name: str = name) -> Any:
            moves.append(name)
            to(*args)
            return own

        module.to = to
    return moves


def test_offloaded_text_encoders_come_and_go_before_the_denoiser_with_all_known_prompts(make_config):
    pipeline = tiny_pipeline()
    moves = moved_parts(pipeline)
    config = make_config(offload_text_encoders=True, num_train_epochs=2)
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline, eval_prompts=["cow"])
    assert moves[: moves.index("unet")] == ["text_encoder"] * 3  # to the CPU, to the device, back
    assert "text_encoder" not in moves[3:]
    del moves[:]
    trainer.train()
    trainer.generate_samples()
    assert "text_encoder" not in moves


def test_offloaded_text_encoders_come_once_a_round_for_prompts_that_are_new(make_config):
    pipeline = tiny_pipeline()
    numbers = itertools.count()
    config = make_config(offload_text_encoders=True, num_train_epochs=2)
    trainer = DDPOTrainer(config, brightness, lambda: (f"cat {next(numbers)}", {}), pipeline)
    moves = moved_parts(pipeline)
    trainer.train()
    assert moves.count("text_encoder") == 2 * 2  # there and back, for eight prompts in two batches


def test_the_autoencoder_comes_after_the_last_step_and_leaves_when_the_images_are_made(make_config):
    pipeline = tiny_pipeline()
    happened: list[str] = []
    move, decode = pipeline.vae.to, pipeline.vae.decode

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            happened.append(name)
            return method(*args, **kwargs)

        return note

    pipeline.vae.to, pipeline.vae.decode = noted("move", move), noted("decode", decode)
    pipeline.unet.register_forward_hook(lambda *_: happened.append("step"))
    trainer = DDPOTrainer(make_config(offload_vae=True, num_sample_batches=1), brightness, PROMPTS, pipeline)
    happened.clear()  # the check at construction
    trainer.generate_samples(["cat"])
    # To the denoiser's device, which is the CPU here, and back. The last of the four steps is followed by no other.
    assert happened == ["step"] * 4 + ["move", "decode", "move"]
    happened.clear()
    trainer.train()
    assert happened.count("move") == 2 and "".join(happened).endswith("stepmovedecodemove")


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


@pytest.mark.parametrize("one_pass", [None, False])
def test_the_plan_counts_what_is_held_once_a_round_is_sampled(make_config, monkeypatch, one_pass):
    """All tensors that are alive then and were not at the start, whoever holds them."""
    trainer = DDPOTrainer(make_config(one_pass=one_pass), brightness, PROMPTS, tiny_pipeline())
    encoder = trainer._policy.runner.policy_pipeline.encode_prompt
    encoder._cache = EmbeddingCache()  # without the first prompt of the trial
    encoder._present.clear()
    before = set(storages())
    held = []
    start = DDPOTrainer._start_updates

    def measured(self: DDPOTrainer, rollout: Any) -> None:
        start(self, rollout)
        held.append(sum(size for place, size in storages().items() if place not in before))

    monkeypatch.setattr(DDPOTrainer, "_start_updates", measured)
    trainer.train()
    plan = trainer.plan
    stated = plan.rollout_bytes + plan.images_bytes
    assert plan.images_bytes == storage_bytes([batch.images for batch in trainer.rollout.batches])
    embeddings = 4 * 12 * 16 * 4  # three prompts and the negative one, of 12 tokens, float32
    assert plan.embeddings_bytes == 8 * 2 * embeddings / 4  # up to: eight prompts with a negative one each
    fingerprints = [batch.fingerprint for batch in trainer.rollout.batches]
    sums = storage_bytes([each for one in fingerprints if one for each in one.weights.values()])
    last = 4 * plan.state_bytes  # latents of the last batch, until the next one
    assert (
        stated + embeddings + sums <= held[0] < 1.1 * (stated + embeddings + last) + sums
    )  # log-probabilities, rewards
    assert f"{plan.images_bytes / 2**20:.3g} MiB" in str(plan)


def storages() -> dict[int, int]:
    """Sizes by place of what all tensors are in."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.layout == torch.strided]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


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
