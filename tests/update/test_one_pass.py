"""One pass: the gradient of two passes, from the forward passes of sampling alone."""

import psutil
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer, load_emoji_pipeline
from ddpo_trl.policy.per_sample_gradients import (
    TrainedLayer,
    Watch,
    reached_rows,
    row_layout,
    trained_layers,
    weight_gradients,
)
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.sampling import differentiate
from test_trainer import PROMPTS, gradients_of_a_round, lora_weights, relative_difference


def both(make_config, pipeline=tiny_pipeline, reward_fn=brightness, **settings):
    """The first gradient in one pass and in two."""
    settings = {"max_grad_norm": 0.0, "loss_type": "sf", **settings}
    return (
        gradients_of_a_round(make_config(one_pass=one_pass, **settings), pipeline(), reward_fn)
        for one_pass in (True, False)
    )


@pytest.mark.parametrize("loss_type", ["sf", "is"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"advantage_normalization": "prompt"},
        {"advantage_normalization": "group", "num_images_per_prompt": 2},
        {"log_prob_reduction": "sum"},
        {"train_timestep_range": [0.25, 0.75]},
        {"transition_weighting": "std"},
        {"sde_window_size": 2, "sde_window_strategy": "random"},
        {"per_device_sample_batch_size": 2, "num_sample_batches": 4, "offload_rollout": True},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2},
    ],
    ids=lambda settings: ",".join(settings) or "default",
)
def test_the_gradient_is_that_of_two_passes(make_config, loss_type, settings):
    one, two = both(make_config, loss_type=loss_type, **settings)
    assert relative_difference(one, two) < 1e-5


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "conv2", "conv_shortcut", "conv_in"]),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "time_emb_proj", "linear_1", "proj_in"]),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_v", "ff.net.2"], lora_bias=True),
    ],
    ids=["convolutions", "time", "biases"],
)
def test_convolutions_time_embeddings_and_biases_are_taken_sample_by_sample_too(make_config, peft_config):
    def pipeline():
        adapted = tiny_pipeline(seed=1)  # with 0, guidance leaves little of the prediction, and rounding counts
        adapted.unet.add_adapter(peft_config)
        return adapted

    # Raw rewards are all positive. Advantages sum to 0, and rounding would count against what is left of the gradient:
    # on some processors two micro-batch sizes in two passes already differ by more than this.
    one, two = both(make_config, pipeline, advantage_normalization="none")
    assert relative_difference(one, two) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "half_pipeline"])
def test_half_precision_differs_by_its_rounding_only(make_config, precision):
    def pipeline():
        return tiny_pipeline() if precision == "bf16" else tiny_pipeline().to(torch.bfloat16)

    one, two = both(make_config, pipeline, bf16=precision == "bf16")
    difference = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert difference < 0.05 * sum(gradient.square().sum() for gradient in two.values()).sqrt()


def test_a_whole_run_ends_with_the_weights_of_two_passes(make_config):
    ends = []
    for one_pass in (True, False):
        config = make_config(one_pass=one_pass, loss_type="sf", num_train_epochs=3, optim="sgd", learning_rate=1.0)
        trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline())
        trainer.train()
        ends.append(lora_weights(trainer))
    assert relative_difference(*ends) < 1e-5


def test_a_resumed_run_ends_as_if_never_interrupted(make_config, tmp_path, monkeypatch):
    settings = {"loss_type": "sf", "save_strategy": "epoch", "one_pass": True}
    whole = DDPOTrainer(make_config(num_train_epochs=2, **settings), brightness, PROMPTS, tiny_pipeline())
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    resumed = DDPOTrainer(make_config(num_train_epochs=2, **settings), brightness, PROMPTS, tiny_pipeline())
    resumed.train(resume_from_checkpoint=checkpoint)
    assert relative_difference(lora_weights(whole), lora_weights(resumed)) == 0.0

    warnings: list[str] = []
    monkeypatch.setattr("ddpo_trl.artifacts.saving.logger.warning", warnings.append)
    config = make_config(num_train_epochs=2, **{**settings, "one_pass": False})
    DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline()).train(resume_from_checkpoint=checkpoint)
    (warning,) = [line for line in warnings if "Resuming" in line]
    assert "one_pass is False and was True: no longer bitwise identical are gradients" in warning


def test_full_fine_tuning_is_taken_sample_by_sample_where_the_layers_allow(make_config):
    def pipeline():
        whole = tiny_pipeline()
        whole.unet.requires_grad_(False)
        whole.unet.down_blocks[0].attentions.requires_grad_(True)
        for module in whole.unet.down_blocks[0].modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.requires_grad_(False)
        return whole

    one, two = both(make_config, pipeline, use_lora=False)
    assert relative_difference(one, two) < 1e-5


def test_the_logged_loss_and_statistics_are_those_of_two_passes(make_config):
    logs = []
    for one_pass in (True, False):
        trainer = DDPOTrainer(make_config(one_pass=one_pass), brightness, PROMPTS, tiny_pipeline())
        trainer.train()
        logs.append(trainer.state.log_history[0])
    one, two = logs
    assert two.keys() - one.keys() == {"val/ratio_deviation"}  # nothing is replayed
    for name in ("loss", "grad_norm", "reward", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"):
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-7), name


def test_the_denoiser_runs_once_per_step_and_no_trajectory_is_kept(make_config):
    calls = []
    pipeline = tiny_pipeline()
    trainer = DDPOTrainer(make_config(one_pass=True), brightness, PROMPTS, pipeline)
    pipeline.unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls == [True] * (2 * 4)  # batches x steps
    assert all(not batch.steps for batch in trainer.rollout.batches)
    kept = [batch.gradients for batch in trainer.rollout.batches]
    assert all(gradients is not None and not gradients.weights for gradients in kept)  # used and given back


def test_steps_that_are_not_trained_on_run_without_grad(make_config):
    calls = []
    pipeline = tiny_pipeline()
    config = make_config(one_pass=True, train_timestep_range=[0.25, 0.75], num_sample_batches=1)
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline)
    pipeline.unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    pipeline.vae.decoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls == [False, True, True, False, False]  # the last is the autoencoder


def test_one_pass_is_the_default_where_it_is_exact(make_config, capsys):
    trainer = DDPOTrainer(make_config(one_pass=None, disable_tqdm=False), brightness, PROMPTS, tiny_pipeline())
    assert trainer.plan.one_pass
    weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trainer.plan.rollout_bytes == 8 * 4 * weights  # samples x bytes x weights
    trainer.train()
    assert "one: gradients are taken while sampling" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"num_mini_batches": 2}, "a round has 2 updates"),
        ({"num_ppo_epochs": 3}, "a round has 3 updates"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1"),
        ({"timestep_fraction": 0.5}, "timestep_fraction is 0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_needs_two_passes_takes_them_and_says_why(make_config, settings, reason):
    with pytest.raises(ValueError, match="one_pass is True, but .*leave one_pass out") as refusal:
        make_config(one_pass=True, **settings)
    assert reason in str(refusal.value)
    trainer = DDPOTrainer(make_config(one_pass=None, **settings), brightness, PROMPTS, tiny_pipeline())
    assert not trainer.plan.one_pass
    assert reason in str(trainer.plan)


def test_a_backward_pass_has_no_more_samples_than_a_training_batch(make_config):
    rows: list[int] = []
    pipeline = tiny_pipeline()
    config = make_config(per_device_sample_batch_size=6, per_device_train_batch_size=4)
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline)
    assert "one: gradients are taken while sampling, in parts of 4 samples" in str(trainer.plan)
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]) // 2))  # with guidance
    trainer.train()
    assert rows == 2 * [*[4] * 4, *[2] * 4]  # two batches of 6 samples, four steps


@pytest.mark.parametrize("insisting", [None, True])
def test_parts_are_taken_where_few_steps_are_trained_on_only_if_asked_for(make_config, insisting):
    settings = {"per_device_train_batch_size": 2, "train_timestep_range": [0.0, 0.25]}
    plan = DDPOTrainer(make_config(one_pass=insisting, **settings), brightness, PROMPTS, tiny_pipeline()).plan
    assert plan.one_pass == bool(insisting)
    reason = "only 1 of 4 steps are trained on, and all would run in parts of 2 samples"
    assert (reason in str(plan)) != plan.one_pass


def test_an_adapter_without_gradients_of_single_samples_takes_two_passes(make_config):
    def pipeline():
        adapted = tiny_pipeline()
        adapted.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
        return adapted

    reason = "whose gradient is not known sample by sample"
    with pytest.raises(ValueError, match=reason):
        DDPOTrainer(make_config(one_pass=True), brightness, PROMPTS, pipeline())
    trainer = DDPOTrainer(make_config(one_pass=None), brightness, PROMPTS, pipeline())
    assert reason in str(trainer.plan)
    trainer.train()


def test_a_denoiser_that_mixes_its_samples_takes_two_passes(make_config):
    """Rows in another order than the samples: single gradients would belong to the wrong rewards."""
    pipeline = tiny_pipeline()
    forward = pipeline.unet.conv_out.forward
    pipeline.unet.conv_out.forward = lambda hidden: forward(hidden).flip(0)
    with pytest.raises(ValueError, match="one_pass is True, but"):
        DDPOTrainer(make_config(one_pass=True), brightness, PROMPTS, pipeline)


@pytest.mark.parametrize("last", [400, 1000], ids=["later steps", "all steps"])
def test_steps_of_another_network_are_named_with_the_remedy(make_config, last):
    pipeline = tiny_pipeline()
    forward = pipeline.unet.forward

    def handing_over(sample, timestep, *args, **kwargs):
        outputs = forward(sample, timestep, *args, **kwargs)
        return tuple(output.detach() for output in outputs) if timestep < last else outputs

    pipeline.unet.forward = handing_over
    trainer = DDPOTrainer(make_config(one_pass=None), brightness, PROMPTS, pipeline)
    assert trainer.plan.one_pass == (last == 400)
    with pytest.raises(RuntimeError, match="No gradient reaches .* at step .*train_timestep_range"):
        trainer.train()


def test_gradients_that_do_not_fit_are_refused_with_their_size(make_config, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match="gradients of a round's samples take .* GiB"):
        DDPOTrainer(make_config(one_pass=True), brightness, PROMPTS, tiny_pipeline())
    assert not DDPOTrainer(make_config(one_pass=None), brightness, PROMPTS, tiny_pipeline()).plan.one_pass


# ---- Activation checkpointing ----


def taken_gradients(policy: Policy, layers: dict[TrainedLayer, int]) -> list[torch.Tensor]:
    """The gradients of two samples."""
    batch = policy.sample_with_gradients(policy.context(["cat", "dog"], [{}] * 2, [0, 1]), {0: 1.0, 1: 1.0}, layers)
    assert batch.gradients is not None
    return batch.gradients.weights


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_gradients_with_checkpointing_are_those_without(make_config, precision):
    """Bitwise, for the embedded pipeline: the same operations on the same numbers."""
    pipeline = load_emoji_pipeline()
    if precision == "bfloat16":
        pipeline.to(torch.bfloat16)
    policy = Policy.from_pipeline(pipeline, make_config(num_inference_steps=2))
    layers = dict.fromkeys(trained_layers(policy.denoiser), 1)
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(std=0.1)  # where one factor is 0, the other's gradient is
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        plain = taken_gradients(policy, layers)
        policy.activation_checkpointing_enable()
        checkpointed = taken_gradients(policy, layers)
    assert all(gradient.any() for gradient in plain)
    assert all(torch.equal(*pair) for pair in zip(plain, checkpointed, strict=True))


def test_checkpointing_runs_layers_twice_and_takes_their_gradients_once(make_config):
    policy = Policy.from_pipeline(tiny_pipeline(), make_config())
    policy.activation_checkpointing_enable()
    layers = trained_layers(policy.denoiser)
    taken: list[int] = []
    runs: list[nn.Module] = []
    watch = Watch(layers, lambda call, grad: taken.append(call.number))

    def take(log_probs: torch.Tensor) -> None:
        watch.backward(log_probs.sum())

    context = policy.context(["cat", "dog"], [{}] * 2, [0, 1])
    hooks = [layer.register_forward_hook(lambda module, *_: runs.append(module)) for layer in layers]
    for _ in range(2):  # the second has the same numbers
        runs.clear()
        with watch.watching():
            differentiate(policy.runner, context, 0, take)
        # The tiny network's last blocks are not checkpointed before their last tensors are needed.
        assert len(layers) < len(runs) <= 2 * len(layers)
        assert sorted(taken) == sorted(set(taken)) and len(taken) == len(layers)
        taken.clear()
    for hook in hooks:
        hook.remove()


def test_a_denoiser_without_checkpointing_is_refused_by_name(make_config):
    pipeline = tiny_pipeline()
    pipeline.unet._supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="gradient_checkpointing is True, but UNet2DConditionModel does not supp"):
        DDPOTrainer(make_config(one_pass=None, gradient_checkpointing=True), brightness, PROMPTS, pipeline)


@pytest.mark.parametrize("one_pass", [None, False])
def test_a_denoiser_that_computes_something_else_with_checkpointing_is_refused_by_name(make_config):
    """As Chroma, which leaves out the mask of its prompt there: it would sample from another policy than its users."""
    pipeline = tiny_pipeline()
    block = pipeline.unet.down_blocks[0].resnets[0]
    forward = block.forward
    block.forward = lambda *args: forward(*args) * (1.1 if torch.is_grad_enabled() else 1.0)
    with pytest.raises(ValueError, match="gradient_checkpointing is True, but UNet2DConditionModel computes someth"):
        DDPOTrainer(make_config(gradient_checkpointing=True), brightness, PROMPTS, pipeline)


# ---- The arithmetic, against autograd ----


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(3, 5), (4, 3)),
        (nn.Linear(3, 5), (4, 7, 3)),
        (nn.Linear(3, 5), (4, 2, 7, 3)),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 8, 8)),
        (nn.Conv2d(3, 5, (1, 3), dilation=2), (4, 3, 8, 8)),
        (nn.Conv2d(3, 5, 1), (4, 3, 8, 8)),
        (nn.Conv2d(3, 5, 1, padding=1), (4, 3, 8, 8)),
        (nn.Conv2d(5, 2, 3, padding=1), (4, 5, 8, 7)),
        (nn.Conv2d(5, 2, (3, 2), padding=(0, 1), dilation=(2, 1)), (4, 5, 8, 7)),
        (nn.Conv2d(5, 2, 3, padding=4), (4, 5, 8, 7)),
        (nn.Conv2d(5, 2, 3, stride=2, padding=1), (4, 5, 8, 7)),
    ],
    ids=str,
)
def test_the_gradient_of_each_row_is_that_of_autograd_on_it_alone(layer, shape):
    inputs = torch.randn(shape)
    outputs = layer(inputs)
    grad = torch.randn_like(outputs)
    gradients = weight_gradients(layer, inputs, grad)
    for row in range(len(inputs)):
        expected = torch.autograd.grad(layer(inputs[row : row + 1]), [layer.weight, layer.bias], grad[row : row + 1])
        torch.testing.assert_close(gradients[layer.weight][row], expected[0])
        torch.testing.assert_close(gradients[layer.bias][row], expected[1])


def test_a_layer_that_sees_no_tokens_reaches_no_rows_and_has_no_gradient():
    """Keys of an image in Wan's attention, where a text of less than 512 tokens leaves none."""
    layer = nn.Linear(3, 5)
    inputs, grad = torch.zeros(2, 0, 3), torch.zeros(2, 0, 5)
    assert reached_rows(grad).tolist() == [False, False]
    gradients = weight_gradients(layer, inputs, grad)
    assert torch.equal(gradients[layer.weight], torch.zeros(2, 5, 3))
    assert torch.equal(gradients[layer.bias], torch.zeros(2, 5))


def reached(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What two samples reach; each row is that of the first (1), the second (2) or of none (0)."""
    owners = torch.tensor(rows)
    return owners == 1, owners == 2


@pytest.mark.parametrize(
    "rows, inner",
    [
        ([1, 2], 1),
        ([1, 2, 1, 2], 1),
        ([1, 1, 2, 2], 2),
        ([1, 1, 2, 2, 1, 1, 2, 2], 2),
        ([1] * 5 + [2] * 5, 5),
        ([0, 0, 1, 2], 1),  # an empty negative prompt
    ],
)
def test_the_layout_of_rows_is_told_from_those_that_each_sample_reaches(rows, inner):
    assert row_layout(*reached(rows)) == inner


@pytest.mark.parametrize("rows", [[1], [1, 1], [2, 1], [1, 2, 2, 1], [1, 2, 1]])
def test_rows_in_another_order_are_refused(rows):
    with pytest.raises(ValueError, match="can't be determined"):
        row_layout(*reached(rows))


OTHER_LAYERS = [nn.LayerNorm(3), nn.Embedding(3, 4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv1d(3, 3, 1)]


@pytest.mark.parametrize("layer", OTHER_LAYERS, ids=str)
def test_layers_of_other_kinds_are_refused_by_name(layer):
    with pytest.raises(ValueError, match=f"0 is a {type(layer).__name__}"):
        trained_layers(nn.Sequential(layer))


def test_weights_that_a_callback_changes_after_sampling_are_not_updated_with_its_gradients(make_config):
    class Writes(TrainerCallback):
        def on_step_begin(self, *args, model=None, **kwargs):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.01)

    trainer = DDPOTrainer(make_config(one_pass=True), brightness, ["cat"], tiny_pipeline(), callbacks=[Writes()])
    with pytest.raises(RuntimeError, match=r"gradients of round 0 belong to other weights: \d+ tensors .*no callback"):
        trainer.train()
