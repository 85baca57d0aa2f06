"""DDPOTrainer: `transformers.Trainer` with a rollout for a data loader and a policy objective for a loss."""

import copy
import dataclasses
import functools
import math
import os
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import ProgressCallback, TrainerCallback, TrainerControl, set_seed
from transformers.utils import logging

from ddpo_trl.artifacts import checkpoints
from ddpo_trl.artifacts.saving import SavingTrainer
from ddpo_trl.artifacts.tracking import RunRecorder, fixed_prompts
from ddpo_trl.checks import ReplayCheck
from ddpo_trl.checks.construction import check_arguments, plan_round
from ddpo_trl.checks.gradients import no_gradient_cause
from ddpo_trl.config import DDPOConfig
from ddpo_trl.distributed import check_alike, check_compilation, check_devices, check_wrapping, note_process
from ddpo_trl.evaluation.evaluator import check_evaluation, reward_names
from ddpo_trl.finite import check_update
from ddpo_trl.policy.fingerprint import changed_weights
from ddpo_trl.policy.loading import load_pipeline
from ddpo_trl.policy.per_sample_gradients import trained_weights
from ddpo_trl.policy.policy import Policy
from ddpo_trl.prompts import (
    PromptFunction,
    PromptKeyFunction,
    ShuffledPrompts,
    default_prompt_key,
    fingerprint,
    prompt_keys,
    prompt_pairs,
    prompt_source,
)
from ddpo_trl.rewards.function import RewardFunction
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rollout.advantages import Advantages
from ddpo_trl.rollout.boundary import RoundCallbacks, RoundSchedule, StopSignals, end_round
from ddpo_trl.rollout.callbacks import RoundProgress, TrainingClock
from ddpo_trl.rollout.loader import RolloutLoader
from ddpo_trl.rollout.metrics import Metrics
from ddpo_trl.rollout.records import Rollout
from ddpo_trl.rollout.trial import preview, trial_image, try_reward_functions
from ddpo_trl.suggestions import checks_names
from ddpo_trl.update import optimizers as optimizers_  # the argument's name is Trainer's
from ddpo_trl.update.objectives import objective
from ddpo_trl.update.one_pass import policy_gradient
from ddpo_trl.update.target_kl import TargetKL


logger = logging.get_logger(__name__)


class DDPOTrainer(SavingTrainer):
    """
    Trainer for Denoising Diffusion Policy Optimization (DDPO).

    Fine-tunes a diffusers pipeline by reinforcement learning, as proposed in [Training Diffusion Models with
    Reinforcement Learning](https://huggingface.co/papers/2305.13301). One Trainer epoch is one round: sample images,
    score them, turn the scores into advantages, optimize.

    Example:

    ```python
    from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
    from ddpo_trl.rewards import jpeg_compressibility

    config = DDPOConfig(output_dir="ddpo-emoji", num_inference_steps=10, num_train_epochs=1, num_sample_batches=2)
    prompts = ["cat face", "pizza", "tulip"]
    trainer = DDPOTrainer(config, jpeg_compressibility, prompts, load_emoji_pipeline())
    trainer.train()
    trainer.save_model()
    ```

    Args:
        config ([`DDPOConfig`]):
            Settings. It is copied: a config can serve several trainers.
        reward_fn (`Callable` or `list[Callable]`):
            See [`~ddpo_trl.rewards.function.RewardFunction`]. Several are added up, weighted by
            `config.reward_weights`. The signature is checked at construction, and the return value with the first
            batch, or at construction with `config.try_reward_fn`.
        prompt_fn (`Callable`, `datasets.Dataset` or `list[str]`):
            A function that returns `(prompt, metadata)`; a dataset with a `prompt` column, whose other columns are the
            metadata; or a list of strings.
        pipeline ([`~diffusers.DiffusionPipeline`], `str` or `os.PathLike`):
            A text-to-image or text-to-video pipeline, the Hub id or folder to load it from (safetensors only), or
            `"emoji"`, the embedded one. Its LoRA adapter is trained; if it has none, one is added. The pipeline is
            moved to the training device; its scheduler is left alone. `ddpo-trl doctor` and
            [`~ddpo_trl.check_pipeline`] report whether it can be trained.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to add, r = 4 on all attention projections by default.
        eval_prompts (`datasets.Dataset` or `list[str]`, *optional*):
            Prompts of [`~DDPOTrainer.evaluate`] and [`~DDPOTrainer.generate_samples`]. Each gives one image, with a
            seed of its own: give it several times for more, and for `eval_diversity`.
        eval_reward_fn (`Callable` or `list[Callable]`, *optional*):
            Reward functions as `reward_fn` that evaluation logs and training does not see: a reward that rises while
            these fall is being gamed.
        prompt_key_fn (`Callable`, *optional*):
            Returns, for a prompt and its metadata, a string that names the task, by which
            `advantage_normalization="prompt"` remembers rewards. By default the prompt and all of its metadata: images
            count by their content, an identifier makes each row a task of its own. `lambda prompt, metadata: prompt`
            compares the text alone.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler; AdamW and a constant rate by default. The optimizer must hold the
            trained parameters, so the pipeline must have its adapter before.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Class of an optimizer, or a function of parameters that makes one, and keyword arguments: it is made for
            the trained parameters.

    Raises:
        `ValueError` or `TypeError`: For everything that can't be trained as asked, with the argument, its value and
            the remedy.
    """

    _tag_names = ["trl", "ddpo", "lora", "diffusers"]
    _name = "DDPO"
    _paper = {
        "title": "Training Diffusion Models with Reinforcement Learning",
        "id": "2305.13301",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{black2024training,
                title        = {{Training Diffusion Models with Reinforcement Learning}},
                author       = {Kevin Black and Michael Janner and Yilun Du and Ilya Kostrikov and Sergey Levine},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations, {ICLR} 2024},
            }"""),
    }

    control: TrainerControl
    loss_is_scaled_for_ga = False  # our loss is the mean of a micro-batch: Trainer divides it by their number

    @checks_names("DDPOTrainer")
    def __init__(
        self,
        config: DDPOConfig,
        reward_fn: RewardFunction | Sequence[RewardFunction],
        prompt_fn: PromptFunction | Dataset | Sequence[str],
        pipeline: DiffusionPipeline | str | os.PathLike[str],
        *,
        peft_config: PeftConfig | None = None,
        eval_prompts: Dataset | Sequence[str] | None = None,
        eval_reward_fn: RewardFunction | Sequence[RewardFunction] | None = None,
        prompt_key_fn: PromptKeyFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        check_arguments(config, callbacks)
        if isinstance(pipeline, str | os.PathLike):
            pipeline = load_pipeline(pipeline)
        args = copy.copy(config)
        check_devices(args)
        set_seed(args.seed)  # the adapter is initialized at random
        self._set_sources(args, reward_fn, prompt_fn, eval_prompts, eval_reward_fn, prompt_key_fn)
        policy = Policy.from_pipeline(pipeline, args, peft_config)
        optimizers_.check_given(optimizers, policy, args.eval_strategy != "no")
        planned = plan_round(policy, pipeline, args, self.prompts, self.eval_prompts)
        self.plan, self._gradient_layers, trial = planned
        super().__init__(
            model=policy,
            args=args,
            eval_dataset=self.eval_prompts,
            callbacks=[RoundSchedule(args.eval_rounds, args.save_rounds, args.updates_per_round), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizers_.as_factory(optimizer_cls_and_kwargs),
        )
        self.callback_handler: RoundCallbacks = RoundCallbacks(self.callback_handler, args.updates_per_round)
        check_wrapping(self.accelerator)
        check_compilation(self.accelerator, args.torch_compile)
        if self.is_fsdp_enabled:
            # Autocast decides on precision, as in sampling. This would round recorded states and log-probabilities.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.pipeline = pipeline
        self.rollout: Rollout  # of the current round
        self.metrics = Metrics()
        self.episodes = 0  # reward queries of the run
        self._update_loss = torch.zeros((), device=args.device)  # of the update's micro-batches so far
        self._target_kl = TargetKL(math.inf if args.target_kl is None else args.target_kl)
        self._replay_check = ReplayCheck(args)
        self._signals = StopSignals(args.stop_on_signal)
        self._own_optimizer = optimizers[0] is not None or optimizer_cls_and_kwargs is not None
        self._ingredients = self._ingredients_of(policy)
        self._example_inputs = {name: values[0] for name, values in trial.inputs.items()}
        self._try_rewards(len(trial))
        self._add_own_callbacks()

    def _set_sources(
        self,
        args: DDPOConfig,
        reward_fn: Any,
        prompt_fn: Any,
        eval_prompts: Any,
        eval_reward_fn: Any,
        prompt_key_fn: PromptKeyFunction | None,
    ) -> None:
        """
        Set rewards and prompts, checked as far as that is possible without the pipeline, and alike on all processes.
        """
        self.scorer = RewardScorer(reward_fn, args.reward_weights, args.max_workers, args.reward_timeout)
        self.eval_scorer = None
        if eval_reward_fn is not None:
            self.eval_scorer = RewardScorer(
                eval_reward_fn, None, args.max_workers, args.reward_timeout, argument="eval_reward_fn"
            )
        self.prompts = prompt_source(prompt_fn, args.seed)
        self.eval_prompts = None if eval_prompts is None else prompt_pairs(eval_prompts, "eval_prompts")
        given: dict[str, Any] = {**args.shared_settings, "reward_fn": self.scorer.names}
        if isinstance(self.prompts, ShuffledPrompts) and args.world_size > 1:
            given["prompt_fn"] = self.prompts.fingerprint
        if self.eval_prompts is not None and args.world_size > 1:
            given["eval_prompts"] = fingerprint(self.eval_prompts)
        check_alike(given)
        if type(self).evaluate is DDPOTrainer.evaluate:  # another one may measure something else
            check_evaluation(args, self.eval_prompts, reward_names(self.scorer, self.eval_scorer))
        self.prompt_key_fn = default_prompt_key if prompt_key_fn is None else prompt_key_fn
        (self._example,) = preview(self.prompts, 1)
        prompt_keys([self._example], self.prompt_key_fn)
        self.advantages = Advantages(args, self.scorer, self.prompt_key_fn)

    def _try_rewards(self, size: int) -> None:
        scorers = [self.scorer] if self.eval_scorer is None else [self.scorer, self.eval_scorer]
        with self.accelerator.autocast():
            image = trial_image(self._policy, self._example)
        self.plan = dataclasses.replace(self.plan, image_bytes=image.nbytes)
        if self.args.try_reward_fn:
            try_reward_functions(scorers, image, self._example, size)

    def _add_own_callbacks(self) -> None:
        """Add progress bars, the clock and the record of the run, in this order and after the user's callbacks."""
        self.progress = RoundProgress(disable=self.args.disable_tqdm or not self.is_world_process_zero())
        self.remove_callback(ProgressCallback)
        self.add_callback(self.progress)
        self.clock = TrainingClock(self.args.device)
        self.add_callback(self.clock)
        first = functools.partial(preview, self.prompts)
        fixed = fixed_prompts(self.args, self.eval_prompts, first, self.plan.prompts_per_round)
        self.recorder = RunRecorder(lambda: self._evaluator, fixed, self.callback_handler.callbacks)
        self.add_callback(self.recorder)

    # ---- The round ----

    def num_examples(self, dataloader: Any) -> int:
        """Reward queries per round: the samples that the Trainer's `train_samples_per_second` counts."""
        return self.plan.samples_per_round

    def get_total_train_batch_size(self, args: Any) -> Any:
        """Reward queries per optimizer step, for the same figure with `max_steps`."""
        return self.plan.samples_per_round / self.args.updates_per_round

    def get_train_dataloader(self) -> RolloutLoader:
        """Return the loader that makes a rollout per epoch: the training set is the policy's own samples."""
        return RolloutLoader(
            policy=self._policy,
            prompts=self.prompts,
            scorer=self.scorer,
            advantages=self.advantages,
            drop_invalid=self.args.on_invalid_reward == "drop",
            plan=self.plan,
            gradient_layers=self._gradient_layers,
            seed=self.args.seed,
            accelerator=self.accelerator,
            progress=self.progress,
            before_sampling=self._forget_rollout,
            on_rollout=self._start_updates,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Print the batch plan and the trained weights, and train. See [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder; or `True` for the last one in `output_dir`, from the start if there is none: so
                the same script can be started again whenever it was stopped. `args.resume_from_checkpoint` by
                default.

        Raises:
            `ValueError`: As [`~DDPOTrainer.checkpoint_to_resume`].
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        check_alike({"resume_from_checkpoint": checkpoint and os.path.basename(checkpoint)})  # disks may not be shared
        self._make_room(checkpoint)
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            print(f"{self.plan!r}\nTrained\n  {self._policy.describe()}")
        self.episodes = 0  # a checkpoint brings its own count
        # Without what a run that failed has left, or one whose last rounds were not logged.
        self._update_loss = torch.zeros((), device=self.args.device)
        self.metrics.clear()
        try:
            with self._signals.handled():
                return super().train(checkpoint, *args, **kwargs)
        except BaseException as error:  # whatever ends a run, one asks next what is left of it
            note_process(error)
            error.add_note(checkpoints.what_is_left(self.args.output_dir, checkpoint))
            raise

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log inside a round; evaluate and save only at its end, on all processes together."""
        act = functools.partial(super()._maybe_log_save_evaluate, *args, **kwargs)
        if self.callback_handler.inside:
            act()
        else:
            end_round(self, self.callback_handler, self._signals, act)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        Run the forward and backward pass of one micro-batch; nothing after `target_kl` has ended the round's updates.
        In one pass, weight the gradients from sampling by the advantages.
        """
        if self.plan.one_pass:
            loss = self._weight_gradients()
        elif self._target_kl.reached:
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._update_loss = self._update_loss + loss.detach()
        if self.accelerator.sync_gradients:  # the update's last micro-batch
            self._end_update(model)
        return loss

    def _weight_gradients(self) -> Tensor:
        """Set the gradient of the round, as the mean over processes, and return the corresponding loss."""
        rollout = self.rollout
        if changed := changed_weights(self._policy.denoiser, rollout.batches[-1].fingerprint):
            raise RuntimeError(
                f"The gradients of round {rollout.round} belong to other weights: {len(changed)} tensors have changed "
                f"since they were sampled with ({changed[0]} first). Let no callback write to them inside a round."
            )
        parameters = trained_weights(self._gradient_layers)
        for parameter, gradient in zip(parameters, policy_gradient(rollout.batches, rollout.advantages), strict=True):
            parameter.grad = self.accelerator.reduce(gradient.to(parameter), reduction="mean")
        dropped = rollout.rewards.isnan().to(rollout.log_probs.device)
        log_probs = rollout.log_probs.masked_fill(dropped[:, None], 0.0)  # may be NaN, and so would 0 · NaN
        weights = log_probs.new_tensor(list(self.plan.weights(rollout.round, self.args.seed).values()))  # of the steps
        result = objective(self.args, log_probs, log_probs, rollout.advantages[:, None] * weights)
        self.metrics.add(result.metrics)
        return result.loss

    def _end_update(self, model: nn.Module) -> None:
        """Check the gradient, and skip the update if it exceeds `target_kl`. Trainer counts the step."""
        loss, self._update_loss = self._update_loss, torch.zeros((), device=self.args.device)
        update = f"optimizer step {self.state.global_step + 1} in round {self.rollout.round}"
        check_update(self.accelerator, self._policy.parameters(), loss, update)
        if self.args.target_kl is None:
            return
        self._target_kl.end_update(self.accelerator)
        self.metrics.add({"policy/updates_skipped": float(self._target_kl.reached)})
        if self._target_kl.reached:
            model.zero_grad()
            # Accelerate's optimizer reads this: its step does nothing now, not even decay momenta or weights.
            self.accelerator.gradient_state._set_sync_gradients(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the objective of one micro-batch, which `inputs` names by the indices of its transitions."""
        batch = self.rollout.transition(**inputs)
        with self.accelerator.autocast():  # as in sampling; sharded models would be run without
            log_probs, kl = model(
                step=batch.step,
                latents=batch.latents,
                next_latents=batch.next_latents,
                context=batch.context,
                with_reference=self.args.kl_coef > 0,
            )
        # Before any update π_θ is π_old. Taking it from this very pass keeps the ratio at 1 where other kernels or
        # half precision would move it.
        old_log_probs = log_probs.detach() if batch.on_policy or not batch.share_counted else batch.log_probs
        result = objective(
            self.args,
            batch.counted(log_probs),
            batch.counted(old_log_probs),
            batch.counted(batch.advantages) * self.plan.weight(batch.step),
        )
        loss, metrics = result.loss, dict(result.metrics)
        if batch.on_policy:
            is_first = self.state.global_step == self.clock.first_step
            metrics["val/ratio_deviation"] = self._replay_check.deviation(
                self._policy, batch, log_probs.detach(), self.rollout, is_first
            )
        if kl is not None:
            loss = loss + self.args.kl_coef * batch.counted(kl).mean()
            metrics["objective/kl"] = batch.counted(kl).detach().mean()
        loss = loss * batch.share_counted  # the mean over all samples, to which dropped ones add nothing
        if not log_probs.requires_grad:
            raise RuntimeError(
                no_gradient_cause(self._policy, batch.step, batch.latents, batch.next_latents, batch.context)
            )
        if self.args.target_kl is not None:
            self._target_kl.add(metrics["policy/approxkl_avg"])
        self.metrics.add(metrics)
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    def _forget_rollout(self) -> None:
        self.recorder.rollout = None
        self.__dict__.pop("rollout", None)

    def _start_updates(self, rollout: Rollout) -> None:
        self.rollout = self.recorder.rollout = rollout
        self._target_kl.begin_round()
        self.episodes += self.plan.samples_per_round
        self.metrics.add(rollout.metrics)
        self.clock.start()

    # ---- Wrapped models ----

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:  # what puts the shards together for `forward` has to do it for these as well
            for method in ("sample", "generate", "probe_schedule"):
                register_fsdp_forward_method(self.model, method)
        return prepared

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures collected since the last call to the training logs."""
        if "loss" in logs:
            self.metrics.add({"time/training": self.clock.take()})
            logs = {**logs, **self.metrics.take(self.accelerator), "episode": self.episodes}
            self._replay_check.warn_of_rounding(logs.get("val/ratio_deviation", 0.0))
            if start_time is not None:
                rounds = (self.state.global_step - self.clock.first_step) / self.plan.updates_per_round
                logs["eps"] = rounds * self.plan.samples_per_round / (time.time() - start_time)
        is_evaluation = any(name.startswith("eval_") for name in logs)
        if is_evaluation:
            logs["episode"] = self.episodes  # for `metrics.csv`
        super().log(logs, start_time)
        if is_evaluation:
            del logs["episode"]  # `evaluate` returns these very logs, and it is not a measurement
