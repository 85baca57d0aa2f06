"""DDPOTrainer: `transformers.Trainer` with a rollout for a data loader and a policy objective for a loss."""

import copy
import dataclasses
import functools
import json
import math
import os
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, save_fsdp_optimizer
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, set_seed
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ddpo_trl import advantages, checkpoints, hub, record, resuming
from ddpo_trl import optimizers as optimizers_  # the argument's name is Trainer's
from ddpo_trl.boundary import RoundCallbacks, RoundSchedule, StopSignals, agree, end_round
from ddpo_trl.callbacks import RoundProgress, TrainingClock
from ddpo_trl.checkpoints import CONFIG_NAME, PLAN_NAME
from ddpo_trl.conditions import changed_weights
from ddpo_trl.config import DDPOConfig
from ddpo_trl.descriptions import DIGITS, code_digest, described
from ddpo_trl.evaluation import Evaluator, Samples, check_evaluation, reward_names
from ddpo_trl.finite import check_update
from ddpo_trl.guard import replay_problem
from ddpo_trl.loader import RolloutLoader
from ddpo_trl.lora import freeze_all_but_denoiser, put_on_adapter
from ddpo_trl.model_card import write_model_card
from ddpo_trl.objectives import importance_sampling, score_function
from ddpo_trl.one_pass import TRIAL_SAMPLES, autocast, choose_passes, policy_gradient
from ddpo_trl.pipelines import ingredients, move
from ddpo_trl.plan import plan_batches
from ddpo_trl.policy import Policy
from ddpo_trl.processes import check_alike, check_wrapping, note_process
from ddpo_trl.prompts import (
    FunctionPrompts,
    PromptFunction,
    PromptKeyFunction,
    PromptPair,
    ShuffledPrompts,
    check_inputs,
    default_prompt_key,
    fingerprint,
    prompt_keys,
    prompt_pairs,
    prompt_source,
)
from ddpo_trl.sample_gradients import trained_weights
from ddpo_trl.scoring import RewardScorer, first_problem
from ddpo_trl.seeding import Stream, derived_seed, randomness_untouched
from ddpo_trl.suggestions import checks_names
from ddpo_trl.target_kl import TargetKL
from ddpo_trl.tracking import RunRecorder, fixed_prompts
from ddpo_trl.types import Context, Objective, RewardFunction, Rollout, Transition


logger = logging.get_logger(__name__)

PROMPT_STATISTICS_NAME = "prompt_statistics.json"
PROMPTS_NAME = "prompts.pt"

# So many prompts of a list are encoded at construction, where text encoders are offloaded.
MAX_PROMPTS_AHEAD = 1024


def check_arguments(config: Any, pipeline: Any, peft_config: Any, callbacks: Any) -> None:
    """
    Refuses arguments of another kind, with what makes the right one of them.

    Raises:
        `TypeError`: With the argument, its type and the remedy.
        `ValueError`: If `output_dir` can't be written to.
    """
    check_callbacks(callbacks)
    if not isinstance(config, DDPOConfig):
        raise TypeError(
            f"config is {type(config).__name__}; give a DDPOConfig, which has the fields of TrainingArguments and "
            "those of DDPO."
        )
    if not isinstance(pipeline, DiffusionPipeline):
        remedy = "give a pipeline of diffusers, with all of its models"
        if isinstance(pipeline, str | os.PathLike):
            remedy = f"load it: `diffusers.DiffusionPipeline.from_pretrained({str(pipeline)!r})`"
        elif isinstance(pipeline, type):
            remedy = f"load it: `{pipeline.__name__}.from_pretrained(...)`"
        what = repr(pipeline) if isinstance(pipeline, str | type) else type(pipeline).__name__
        raise TypeError(f"pipeline is {what}; {remedy}.")
    if not isinstance(peft_config, PeftConfig | None):
        raise TypeError(
            f"peft_config is {type(peft_config).__name__}; give a `peft.LoraConfig(...)`, or leave it out."
        )
    try:
        os.makedirs(config.output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir is {config.output_dir!r}, which can't be made ({error}). Set a folder that can be written to."
        ) from error


def check_callbacks(callbacks: Any) -> None:
    """Raises a `TypeError` if they are not a list of callbacks or their classes."""
    if not isinstance(callbacks, list | tuple | None):
        raise TypeError(f"callbacks is {type(callbacks).__name__}; give a list of callbacks.")
    for index, callback in enumerate(callbacks or ()):
        if not isinstance(callback, TrainerCallback) and not (
            isinstance(callback, type) and issubclass(callback, TrainerCallback)
        ):
            raise TypeError(f"callbacks[{index}] is {callback!r}; give a `transformers.TrainerCallback`.")


class DDPOTrainer(Trainer):
    """
    Trainer for Denoising Diffusion Policy Optimization (DDPO).

    Fine-tunes a diffusers pipeline by reinforcement learning, as proposed in [Training Diffusion Models with
    Reinforcement Learning](https://huggingface.co/papers/2305.13301). One Trainer epoch is one round: sample images,
    score them, turn the scores into advantages, optimise.

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
            See [`~ddpo_trl.types.RewardFunction`]. Several are added up, weighted by `config.reward_weights`. Called
            once at construction, on an image made with a single denoising step and, unless batches have one image, a
            darker copy of it: so a wrong signature or return value is refused before time is spent.
        prompt_fn (`Callable`, `datasets.Dataset` or `list[str]`):
            A function that returns `(prompt, metadata)`; a dataset with a `prompt` column, whose other columns are the
            metadata; or a list of strings.
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A text-to-image or text-to-video pipeline. If it carries a LoRA adapter, that is trained; else one is
            added. It is moved to the training device; its scheduler is left alone. `ddpo-trl doctor` and
            [`~ddpo_trl.check_pipeline`] tell whether it can be trained.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to add, r = 4 on all attention projections by default.
        eval_prompts (`datasets.Dataset` or `list[str]`, *optional*):
            Prompts of [`~DDPOTrainer.evaluate`] and [`~DDPOTrainer.generate_samples`]. Each gives one image, with a
            seed of its own: give it several times for more, and for `eval_diversity`.
        eval_reward_fns (`Callable` or `list[Callable]`, *optional*):
            Reward functions as `reward_fn` that evaluation logs and training does not see: a reward that rises while
            these fall is being gamed.
        prompt_key_fn (`Callable`, *optional*):
            Returns, for a prompt and its metadata, a string that names the task, by which
            `advantage_normalization="prompt"` remembers rewards. By default the prompt and all of its metadata: images
            count by their content, an identifier makes each row a task of its own. `lambda prompt, metadata: prompt`
            goes by the text alone.
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
        pipeline: DiffusionPipeline,
        *,
        peft_config: PeftConfig | None = None,
        eval_prompts: Dataset | Sequence[str] | None = None,
        eval_reward_fns: RewardFunction | Sequence[RewardFunction] | None = None,
        prompt_key_fn: PromptKeyFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        check_arguments(config, pipeline, peft_config, callbacks)
        args = copy.copy(config)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, and DataParallel can't drive a pipeline. Start the "
                "script with `accelerate launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        set_seed(args.seed)  # the adapter is initialised at random
        self.scorer = RewardScorer(reward_fn, args.reward_weights, args.max_workers, args.reward_timeout)
        self.prompts = prompt_source(prompt_fn, args.seed)
        self.eval_prompts = None if eval_prompts is None else prompt_pairs(eval_prompts, "eval_prompts")
        self.eval_scorer = None
        if eval_reward_fns is not None:
            self.eval_scorer = RewardScorer(
                eval_reward_fns, None, args.max_workers, args.reward_timeout, argument="eval_reward_fns"
            )
        self._check_alike(args)
        if type(self).evaluate is DDPOTrainer.evaluate:  # another one may measure something else
            check_evaluation(args, self.eval_prompts, reward_names(self.scorer, self.eval_scorer))
        if args.use_lora:
            adapter = put_on_adapter(pipeline, peft_config)
        else:
            adapter = None
            freeze_all_but_denoiser(pipeline, peft_config)
        policy = Policy(pipeline, args, adapter)
        optimizers_.check_given(optimizers, policy, args.eval_strategy != "no")
        self._check_inputs(policy)
        self.prompt_key_fn = default_prompt_key if prompt_key_fn is None else prompt_key_fn
        ((prompt, metadata),) = self._preview(1)
        prompt_keys([(prompt, metadata)], self.prompt_key_fn)
        if args.offload_text_encoders:  # before the denoiser is beside them
            with autocast(args):
                policy.encode(self._known_prompts(policy), args.device)
        move(pipeline, args.device, args)
        batches = self._trial(policy)
        trial_size = min(TRIAL_SAMPLES, args.per_device_sample_batch_size)
        trial = batches.rows(range(trial_size))
        with autocast(args):
            plan = plan_batches(args, *policy.survey(batches))
            self.plan, self._gradient_layers = choose_passes(args, policy, trial, plan)
        args.gradient_accumulation_steps = self.plan.micro_batches_per_update
        if args.save_total_limit == 1 and args.metric_for_best_model is not None:
            args.save_total_limit = 2  # at the end Trainer would delete the last one, which a stopped run goes on from
        if args.total_episodes is not None:
            args.num_train_epochs = self.plan.rounds_for(args.total_episodes)

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
        if self.is_fsdp_enabled:
            # Autocast decides on precision, as in sampling. This would round recorded states and log-probabilities.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.pipeline = pipeline
        self.progress = RoundProgress(disable=args.disable_tqdm or not self.is_world_process_zero())
        self.remove_callback(ProgressCallback)
        self.add_callback(self.progress)
        self.normalize = self._normalizer()
        self.normalize_each: list[advantages.Normalizer] = []
        if args.multi_objective_aggregation == "normalize_then_sum":
            self.normalize_each = [self._normalizer() for _ in self.scorer.names]
            self.normalize = advantages.normalize_by_batch
        self.rollout: Rollout  # of the current round
        self._metrics: defaultdict[str, list[Tensor | float]] = defaultdict(list)
        self.clock = TrainingClock()
        self.add_callback(self.clock)
        self._episodes = 0  # reward queries of the run
        self._update_loss = torch.zeros((), device=args.device)  # of the update's micro-batches so far
        self._target_kl = TargetKL(math.inf if args.target_kl is None else args.target_kl)
        self._warned_of_rounding = False
        self._staging: str | None = None  # where a checkpoint is being written
        self._signals = StopSignals(args.stop_on_signal)
        self._trained_in: str | None = None  # output_dir of an earlier call of `train`
        self._own_optimizer = optimizers[0] is not None or optimizer_cls_and_kwargs is not None
        # Before weights are divided among processes, and functions count their calls.
        self._ingredients = {**ingredients(pipeline), **policy.adapter_record, **self._code()}
        self._example_prompt = prompt
        self._example_inputs = {name: values[0] for name, values in trial.inputs.items()}
        self._try_reward_function(prompt, metadata, trial_size)
        fixed = fixed_prompts(args, self.eval_prompts, self._preview, self.plan.prompts_per_round)
        self.recorder = RunRecorder(lambda: self._evaluator, fixed, self.callback_handler.callbacks)
        self.add_callback(self.recorder)

    # ---- The round ----

    def get_train_dataloader(self) -> RolloutLoader:
        """The loader that makes a rollout per epoch. There is no training set but the policy's own samples."""
        return RolloutLoader(
            policy=self._policy,
            prompts=self.prompts,
            scorer=self.scorer,
            keys=self._keys,
            normalize=self.normalize,
            normalize_each=self.normalize_each,
            populations=[self._populations(normalizer) for normalizer in self.normalize_each or [self.normalize]],
            drop_invalid=self.args.on_invalid_reward == "drop",
            advantage_clip=math.inf if self.args.advantage_normalization == "none" else self.args.advantage_clip,
            plan=self.plan,
            gradient_layers=self._gradient_layers,
            seed=self.args.seed,
            accelerator=self.accelerator,
            progress=self.progress,
            before_sampling=self._forget_rollout,
            on_rollout=self._start_optimising,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Prints the batch plan and what is trained, and trains. See [`~transformers.Trainer.train`].

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
            print(f"Batch plan\n{self.plan}\nTrained\n  {self._policy.describe()}")
        self._episodes = 0  # a checkpoint brings its own count
        # Without what a run that failed has left, or one whose last rounds were not logged.
        self._update_loss = torch.zeros((), device=self.args.device)
        self._metrics.clear()
        try:
            with self._signals.handled():
                return super().train(checkpoint, *args, **kwargs)
        except BaseException as error:  # whatever ends a run, one asks next what is left of it
            note_process(error)
            error.add_note(checkpoints.what_is_left(self.args.output_dir, checkpoint))
            raise

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Inside a round this only logs: all else waits for its end, and is done there by all processes."""
        act = functools.partial(super()._maybe_log_save_evaluate, *args, **kwargs)
        if self.callback_handler.inside:
            act()
        else:
            end_round(self, self.callback_handler, self._signals, act)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        Forward and backward pass of one micro-batch; or nothing once `target_kl` has ended the round's updates. In one
        pass, the advantages weigh the gradients that sampling left.
        """
        if self.plan.one_pass:
            loss = self._weigh_gradients()
        elif self._target_kl.reached:
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._update_loss = self._update_loss + loss.detach()
        if self.accelerator.sync_gradients:  # the update's last micro-batch
            self._end_update(model)
        return loss

    def _weigh_gradients(self) -> Tensor:
        """Sets the gradient of the round, as the mean over processes, and returns the loss that it belongs to."""
        rollout = self.rollout
        if changed := changed_weights(self._policy.denoiser, rollout.batches[-1].conditions):
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
        objective = self._objective(log_probs, log_probs, rollout.advantages[:, None] * weights)
        for name, value in objective.metrics.items():
            self._metrics[name].append(value)
        return objective.loss

    def _end_update(self, model: nn.Module) -> None:
        """Check the gradient, and leave the update out if it goes beyond `target_kl`. Trainer counts the step."""
        loss, self._update_loss = self._update_loss, torch.zeros((), device=self.args.device)
        update = f"optimizer step {self.state.global_step + 1} in round {self.rollout.round}"
        check_update(self.accelerator, self._policy.parameters(), loss, update)
        if self.args.target_kl is None:
            return
        self._target_kl.end_update(self.accelerator)
        self._metrics["policy/updates_skipped"].append(float(self._target_kl.reached))
        if self._target_kl.reached:
            model.zero_grad()
            # Accelerate's optimizer goes by this: its step does nothing now, not even decay momenta or weights.
            self.accelerator.gradient_state._set_sync_gradients(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective of one micro-batch, which `inputs` names by the indices of its transitions."""
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
        objective = self._objective(
            batch.counted(log_probs),
            batch.counted(old_log_probs),
            batch.counted(batch.advantages) * self.plan.weight(batch.step),
        )
        loss, metrics = objective.loss, dict(objective.metrics)
        if batch.on_policy:
            metrics["val/ratio_deviation"] = self._ratio_deviation(log_probs.detach(), batch)
        if kl is not None:
            loss = loss + self.args.kl_coef * batch.counted(kl).mean()
            metrics["objective/kl"] = batch.counted(kl).detach().mean()
        loss = loss * batch.share_counted  # the mean over all samples, to which dropped ones add nothing
        if not log_probs.requires_grad:
            raise RuntimeError(self._policy.no_gradient(batch.step, batch.latents, batch.next_latents, batch.context))
        if self.args.target_kl is not None:
            self._target_kl.add(metrics["policy/approxkl_avg"])
        for name, value in metrics.items():
            self._metrics[name].append(value)
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    @property
    def _policy(self) -> Policy:
        return self.accelerator.unwrap_model(self.model)

    def _forget_rollout(self) -> None:
        self.recorder.rollout = None
        self.__dict__.pop("rollout", None)

    def _start_optimising(self, rollout: Rollout) -> None:
        self.rollout = self.recorder.rollout = rollout
        self._target_kl.begin_round()
        self._episodes += self.plan.samples_per_round
        for name, value in rollout.metrics.items():
            self._metrics[name].append(value)
        self.clock.start()

    def _keys(self, pairs: Sequence[PromptPair]) -> Sequence[Hashable]:
        """What the samples of a round are compared by: the draw of their prompt, or what it asks for."""
        if self.args.advantage_normalization == "prompt":
            return prompt_keys(pairs, self.prompt_key_fn)
        return [index // self.plan.num_images_per_prompt for index in range(len(pairs))]

    def _normalizer(self) -> advantages.Normalizer:
        match self.args.advantage_normalization:
            case "prompt":
                return advantages.PromptStatistics(
                    self.args.per_prompt_stat_tracking_buffer_size, self.args.per_prompt_stat_tracking_min_count
                )
            case "group":
                return advantages.normalize_by_group
            case "none":
                return advantages.keep_raw
            case _:
                return advantages.normalize_by_batch

    def _populations(self, normalizer: advantages.Normalizer) -> advantages.Populations:
        if isinstance(normalizer, advantages.PromptStatistics):
            return normalizer.populations
        return advantages.groups if self.args.advantage_normalization == "group" else advantages.whole_round

    def _objective(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Objective:
        if self.args.loss_type == "sf":
            return score_function(log_probs, advantages)
        return importance_sampling(log_probs, old_log_probs, advantages, self.args.cliprange)

    def _ratio_deviation(self, log_probs: Tensor, batch: Transition) -> Tensor:
        """Largest |ratio − 1| of replay to rollout before any update; in the first round a large one is an error."""
        if not batch.share_counted:
            return torch.zeros_like(log_probs[0])
        if self.state.global_step == self._initial_global_step:
            origins = [self.rollout.origin(sample) for sample in batch.samples]
            if problem := replay_problem(self._policy, batch, log_probs, origins):
                raise RuntimeError(problem)
        return (torch.exp(log_probs - batch.log_probs) - 1).abs().max()

    def _warn_of_rounding(self, deviation: float) -> None:
        """The first update starts from ratios of 1, whatever the rounding. Those after it are clipped with it."""
        args = self.args
        if self.plan.updates_per_round > 1 and deviation > args.cliprange and not self._warned_of_rounding:
            self._warned_of_rounding = True
            logger.warning(
                f"Replayed ratios differ from 1 by {deviation:.1e} before any update, more than cliprange "
                f"({args.cliprange:g}): in the later updates of a round clipping goes by rounding. It vanishes if "
                f"per_device_train_batch_size ({args.per_device_train_batch_size}) is per_device_sample_batch_size "
                f"({args.per_device_sample_batch_size})."
            )

    def _check_alike(self, args: DDPOConfig) -> None:
        """Refuses processes that were given other settings, prompts or reward functions than the first."""
        given: dict[str, Any] = {**args.shared_settings, "reward_fn": self.scorer.names}
        if isinstance(self.prompts, ShuffledPrompts) and args.world_size > 1:
            given["prompt_fn"] = fingerprint(self.prompts.pairs)
        if self.eval_prompts is not None and args.world_size > 1:
            given["eval_prompts"] = fingerprint(self.eval_prompts)
        check_alike(given)

    def _check_inputs(self, policy: Policy) -> None:
        """Refuses prompts without what `pipeline_inputs` names, all that are known by now."""
        if isinstance(self.prompts, ShuffledPrompts):
            check_inputs(self.prompts.pairs, policy.input_names, "prompt_fn")
        if self.eval_prompts is not None:
            check_inputs(self.eval_prompts, policy.input_names, "eval_prompts")

    def _known_prompts(self, policy: Policy) -> Iterator[Context]:
        """Batches of the prompts that are known before training begins, those of the first rounds first."""
        pairs = self._preview(1)
        if isinstance(self.prompts, ShuffledPrompts) and not policy.input_names:  # these may be large
            pairs = self._preview(min(len(self.prompts.pairs), MAX_PROMPTS_AHEAD))
        own = list({prompt: (prompt, metadata) for prompt, metadata in [*pairs, *(self.eval_prompts or ())]}.values())
        size = policy.settings.per_device_sample_batch_size
        for first in range(0, len(own), size):
            prompts, metadata = zip(*own[first : first + size], strict=True)
            yield policy.context(prompts, metadata, range(len(prompts)))

    def _trial(self, policy: Policy) -> Context:
        """
        The samples that are tried at construction: two, unless all batches have one. With inputs they are different
        ones, which show whether a sample depends on those next to it.
        """
        settings = policy.settings
        size = min(TRIAL_SAMPLES, max(settings.per_device_sample_batch_size, settings.per_device_train_batch_size))
        pairs = self._preview(size) if policy.input_names else self._preview(1) * size
        prompts, metadata = zip(*pairs, strict=True)
        seeds = [derived_seed(settings.seed, Stream.EVALUATION, index) for index in range(size)]
        return policy.context(prompts, metadata, seeds)

    def _preview(self, count: int) -> list[PromptPair]:
        """The first prompts of a run that starts at round 0, those of the first process on all."""
        pairs = self.prompts.preview(count)
        return pairs if self.prompts.alike_on_all_processes else broadcast_object_list(pairs)

    def _try_reward_function(self, prompt: str, metadata: Any, size: int) -> None:
        """
        Scores an image made in one denoising step: a faulty reward function is refused at construction. Where batches
        have more than one, it comes a second time, darker, since what a function makes of one image tells little of
        what it makes of two.
        """
        seed = derived_seed(self.args.seed, Stream.EVALUATION, 0)
        with self.accelerator.autocast():
            image = self._policy.sample(self._policy.context([prompt], [metadata], [seed]), max_steps=1).images
        self.plan = dataclasses.replace(self.plan, image_bytes=image.nbytes)
        images = torch.cat([image, image / 2])[:size]
        scorers = [self.scorer] if self.eval_scorer is None else [self.scorer, self.eval_scorer]
        when = "trial at construction"
        with randomness_untouched(self.args.device):
            scores = [scorer.submit(images, [prompt] * size, [metadata] * size, when) for scorer in scorers]
            first_problem(scores, raises=True)  # whatever on_invalid_reward says: here it is a mistake

    # ---- Wrapped models ----

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:  # what puts the shards together for `forward` has to do it for these as well
            for method in ("sample", "generate", "survey"):
                register_fsdp_forward_method(self.model, method)
        return prepared

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what has gathered since the last call to the training logs."""
        if "loss" in logs:
            logs = {**logs, **self._take_metrics()}
            self._warn_of_rounding(logs.get("val/ratio_deviation", 0.0))
            if start_time is not None:
                rounds = (self.state.global_step - self._initial_global_step) / self.plan.updates_per_round
                logs["eps"] = rounds * self.plan.samples_per_round / (time.time() - start_time)
        is_evaluation = any(name.startswith("eval_") for name in logs)
        if is_evaluation:
            logs["episode"] = self._episodes  # for `metrics.csv`
        super().log(logs, start_time)
        if is_evaluation:
            del logs["episode"]  # `evaluate` returns these very logs, and it is not a measurement

    def _take_metrics(self) -> dict[str, float]:
        """
        Combine what has gathered since the last log, over micro-batches, rounds and processes, and empty the store.

        Means, except for a deviation (the largest) and times (the sum over the rounds of the log). `episode` is the
        count so far.
        """
        self._metrics["time/training"].append(self.clock.take())
        metrics = {}
        for name, values in self._metrics.items():
            local = torch.tensor([float(value) for value in values], device=self.args.device)
            combine = torch.max if name == "val/ratio_deviation" else torch.mean
            own = torch.sum(local) if name.startswith("time/") else combine(local)
            metrics[name] = combine(self.accelerator.gather(own)).item()
        self._metrics.clear()
        return {**metrics, "episode": self._episodes}

    # ---- Evaluation ----

    def generate_samples(self, prompts: Dataset | Sequence[str] | None = None) -> Samples:
        """
        Makes and scores one image per prompt with the pipeline's own scheduler, as its users will.

        The i-th image has the same seed in every call: images before and after training can be laid side by side.

        Args:
            prompts (`datasets.Dataset` or `list[str]`, *optional*):
                The prompts, `eval_prompts` by default.

        Raises:
            `ValueError`: If there are no prompts.
        """
        return self._evaluator.generate(self._pairs_to_evaluate(prompts))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Measures the pipeline on `eval_prompts`, with its own scheduler, and what the training sampler makes of them.

        Each prompt gives two images, from one seed: one as [`~DDPOTrainer.generate_samples`] makes it, and one by the
        sampler of the training rounds, so an evaluation costs twice the images and reward queries that it has prompts.
        `metric_for_best_model` may name any of the figures. Trackers show them as `eval/reward` and so on.

        Args:
            eval_dataset (`datasets.Dataset` or `list[str]`, *optional*):
                The prompts, `eval_prompts` by default. A prompt given several times gets as many images.
            ignore_keys (`list[str]`, *optional*):
                Not used: there are no model outputs to drop.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics.

        Returns:
            `dict` with

            - `{prefix}_reward`, `{prefix}_reward_std`: mean and standard deviation of the reward.
            - `{prefix}_rewards/<name>/mean`, `{prefix}_rewards/<name>/std`: those of each reward function, the
              held-out `eval_reward_fns` among them.
            - `{prefix}_reward_sde_gap`: mean reward under the training sampler less `{prefix}_reward`: what training
              reports and users don't get.
            - `{prefix}_diversity`: root mean square distance, in [0, 1], between images of the same prompt, averaged
              over the prompts that are given at least twice. Absent if there are none.
        """
        last_round = max(0, self.state.global_step // self.plan.updates_per_round - 1)  # whose sampler is meant
        steps = self.plan.noisy_steps(last_round, self.args.seed)
        metrics = self._evaluator.metrics(self._pairs_to_evaluate(eval_dataset), steps, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        if not self.callback_handler.inside:  # before it is saved: a callback may have ended training, on one process
            agree(self, self._signals)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:  # whatever save_rounds says
            self.control.should_save = True
        return is_best

    @property
    def _evaluator(self) -> Evaluator:
        return Evaluator(
            policy=self._policy,
            scorer=self.scorer,
            held_out=self.eval_scorer,
            drop_invalid=self.args.on_invalid_reward == "drop",
            accelerator=self.accelerator,
            seed=self.args.seed,
            batch_size=self.args.per_device_eval_batch_size,
            progress=self.progress,
        )

    def _pairs_to_evaluate(self, prompts: Dataset | Sequence[str] | None) -> Sequence[PromptPair]:
        pairs = self.eval_prompts if prompts is None else prompt_pairs(prompts, "prompts")
        if pairs is None:
            raise ValueError("There are no prompts to sample: give `prompts` here or `eval_prompts` to the trainer.")
        check_inputs(pairs, self._policy.input_names, "prompts")
        return pairs

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves what is trained, for plain diffusers to load, with the settings; and pushes it if `args.push_to_hub`.

        All processes have to call it; one of them writes. A push that fails is an error in the log, and no exception.

        Args:
            output_dir (`str`, *optional*):
                Where to, `args.output_dir` by default.
        """
        directory = output_dir or self.args.output_dir
        os.makedirs(directory, exist_ok=True)
        self._policy.save(directory, write=self.args.should_save)
        if self.args.should_save:
            with open(os.path.join(directory, CONFIG_NAME), "w") as file:
                file.write(self.args.to_json_string())
        if self.args.push_to_hub and not _internal_call:
            with hub.failures_logged():
                self.push_to_hub(commit_message="Model save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the frozen model into every checkpoint too.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside, and names it when it is complete: a run that is killed leaves no half of one."""
        run_directory = self._get_output_dir(trial)
        self._staging = os.path.join(run_directory, checkpoints.STAGING_NAME)
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = (os.path.join(place, folder) for place in (self._staging, run_directory))
        if self.args.should_save:
            checkpoints.clear(self._staging)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_model_checkpoint == staged:
            self.state.best_model_checkpoint = final
        if self.args.should_save:
            self._save_round(staged)
        self.accelerator.wait_for_everyone()  # all have written their part
        if self.args.should_save:
            checkpoints.publish(staged, final)
            rotate_checkpoints(run_directory, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _save_round(self, directory: str) -> None:
        """What Trainer does not know of: the batch plan, the prompts' state, the rewards remembered of each prompt."""
        self.state.save_to_json(os.path.join(directory, TRAINER_STATE_NAME))  # with the final name of the best one
        with open(os.path.join(directory, PLAN_NAME), "w") as file:
            json.dump(dataclasses.asdict(self.plan), file)
        run = {
            "episodes": self._episodes,
            **self._what_is_run,
            **self._optimizer_record(),
            **self.recorder.state_dict(),
        }
        with open(os.path.join(directory, resuming.RUN_NAME), "w") as file:
            json.dump(run, file)
        torch.save(self.prompts.state_dict(), os.path.join(directory, PROMPTS_NAME))
        if self._prompt_statistics:
            with open(os.path.join(directory, PROMPT_STATISTICS_NAME), "w") as file:
                json.dump([statistics.state_dict() for statistics in self._prompt_statistics], file)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._policy.load(resume_from_checkpoint)

    # ---- Resuming ----

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        for group in (optimizer or self.optimizer).param_groups:
            group.setdefault("initial_lr", copy.deepcopy(group["lr"]))  # ReduceLROnPlateau does not write it down
        # Before a checkpoint's take their place. DeepSpeed hands in its own optimizer.
        self._hyperparameters = optimizers_.hyperparameters(optimizer or self.optimizer)
        return scheduler

    def _load_callback_state(self) -> None:
        for callback in self.callback_handler.callbacks:
            saved = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                saved["args"] = callback.state()["args"]  # as given now: the checkpoint's would take their place
        super()._load_callback_state()

    def _code(self) -> dict[str, str]:
        """Hashes of the functions that were given, by name."""
        functions: dict[str, Callable[..., Any]] = dict(zip(self.scorer.names, self.scorer.functions, strict=True))
        if isinstance(self.prompts, FunctionPrompts):
            functions["prompt_fn"] = self.prompts.prompt_fn
        return {f"The code of {name}": code_digest(function)[:DIGITS] for name, function in functions.items()}

    def _optimizer_record(self) -> dict[str, Any]:
        return optimizers_.record(self.optimizer, self.lr_scheduler, self._hyperparameters)

    @property
    def _rewards(self) -> dict[str, float]:
        """Weights of the reward functions, by name."""
        return dict(zip(self.scorer.names, self.scorer.weights.tolist(), strict=True))

    @functools.cached_property
    def _what_is_run(self) -> dict[str, Any]:
        """What makes this run another one than others with its settings, as a checkpoint holds it."""
        return {
            "rewards": self._rewards,
            "prompts": self.prompts.fingerprint,
            "eval_prompts": None if self.eval_prompts is None else fingerprint(self.eval_prompts),
            "prompt_key_fn": described(self.prompt_key_fn),
            "ingredients": self._ingredients,
        }

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None = None) -> str | None:
        """
        The checkpoint that [`~DDPOTrainer.train`] goes on from; `None` if it begins.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As for [`~DDPOTrainer.train`].

        Raises:
            `ValueError`: If there is no such checkpoint, if it can't be gone on from with these settings, or if
                `output_dir` holds another run.
        """
        directory = self.args.output_dir
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = checkpoints.to_resume(asked, directory, own_folder=self._trained_in == directory)
        if checkpoint is not None:
            self._changes_since(checkpoint)
        elif asked:
            logger.warning(f"There is no checkpoint in {directory} to resume from: starting anew.")
        return checkpoint

    def _changes_since(self, checkpoint: str) -> list[str]:
        """What the resumed run does otherwise, in words; an error if it can't be continued."""
        saved = resuming.read(checkpoint)
        plan = json.loads(json.dumps(dataclasses.asdict(self.plan)))  # tuples as lists, as they were saved
        settings = resuming.with_plan(json.loads(self.args.to_json_string()), plan)
        changes = [*resuming.setting_changes(saved.settings, settings, self._own_optimizer)]
        if saved.run is None:
            changes.append(f"it has no {resuming.RUN_NAME}: whether rewards and prompts are its own is not known.")
        else:
            changes += resuming.run_changes(saved.run, self._what_is_run, self.args.resume_with_new_rewards)
        return changes

    def _make_room(self, checkpoint: str | None) -> None:
        """Leaves in `output_dir` nothing that this run does not go on from."""
        is_new = checkpoint is None and self._trained_in != self.args.output_dir
        if self.is_world_process_zero():
            files = record.run_files(self.args.output_dir) if is_new else []
            done = checkpoints.make_room(self.args.output_dir, checkpoint, files)
            if done:
                logger.warning(done)
        self._trained_in = self.args.output_dir
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        run = resuming.read(checkpoint).run
        if run is not None:
            optimizers_.check_same(run, self._optimizer_record())
        super()._load_optimizer_and_scheduler(checkpoint)
        before = optimizers_.hyperparameters(self.optimizer) if run is None else run["groups"]
        changes = optimizers_.keep_changed(self.optimizer, self.lr_scheduler, self._hyperparameters, before)
        changes = changes if self._own_optimizer else []  # else the settings' changes say it
        for change in [*self._changes_since(checkpoint), *changes]:
            logger.warning(f"Resuming from {checkpoint}: {change}")
        self._load_round(checkpoint)  # here because all ways to wrap a model come by

    def _load_round(self, checkpoint: str) -> None:
        """Reads what [`_save_round`] wrote."""
        saved = resuming.read(checkpoint)
        # Before checkpoints held the count, the rounds of a run were all of one size.
        rounds = self.state.global_step // self.plan.updates_per_round
        self._episodes = (saved.run or {}).get("episodes", rounds * self.plan.samples_per_round)
        prompts = torch.load(os.path.join(checkpoint, PROMPTS_NAME), weights_only=True)
        if saved.run is None or saved.run["prompts"] == self.prompts.fingerprint:
            self.prompts.load_state_dict(prompts)
        if self._prompt_statistics and saved.settings.get("advantage_normalization", "prompt") == "prompt":
            self._load_prompt_statistics(os.path.join(checkpoint, PROMPT_STATISTICS_NAME), saved.run)
        self.recorder.load_state_dict(saved.run or {"earlier_logs": [], "earlier_steps": 0})
        resuming.find_best(self.state, checkpoint, saved.settings, vars(self.args))
        self._load_rng_state(checkpoint)  # Trainer does so in the next round, which a finished run does not have

    @property
    def _prompt_statistics(self) -> list[advantages.PromptStatistics]:
        """Those of the sum, or of each reward function; none if advantages don't go by prompt."""
        normalizers = [self.normalize, *self.normalize_each]
        return [one for one in normalizers if isinstance(one, advantages.PromptStatistics)]

    def _load_prompt_statistics(self, path: str, run: dict[str, Any] | None) -> None:
        with open(path) as file:
            states = json.load(file)
        own, before = self._rewards, self._rewards if run is None else run["rewards"]
        key_fn = described(self.prompt_key_fn)
        if len(states) != len(self._prompt_statistics):
            logger.warning(
                f"{path} has the remembered rewards of {len(states)} sums or reward functions, and this run has "
                f"{len(self._prompt_statistics)}: they are forgotten."
            )
        elif [*own] != [*before] if self.normalize_each else own != before:
            logger.warning(
                f"{path} has the remembered rewards of {before}, and this run has {own}: they are forgotten."
            )
        elif run is not None and run.get("prompt_key_fn", key_fn) != key_fn:
            logger.warning(
                f"{path} has rewards remembered by {run['prompt_key_fn']}, and prompt_key_fn is {key_fn}: they are "
                "forgotten."
            )
        else:
            for statistics, state in zip(self._prompt_statistics, states, strict=True):
                statistics.load_state_dict(state)

    def _load_best_model(self) -> None:
        self._policy.load(self.state.best_model_checkpoint)

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository; Trainer does so at construction, so that what is refused is refused there."""
        if self.is_world_process_zero():
            self.hub_model_id = hub.open_repository(self.args, token, private)
            self.push_in_progress: PushInProgress | None = None

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Saves to `output_dir`, and pushes that to the Hub, but for the checkpoints: weights, model card, pictures,
        settings. All processes have to call it.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until everything has arrived. If not, a failure is a warning in the log.
            token (`str`, *optional*):
                A token that may write; `args.hub_token` or the one you are logged in with by default.
            revision (`str`, *optional*):
                The branch, `args.hub_revision` or `"main"` by default.
            private (`bool`, *optional*):
                Whether the repository is private if it has to be made, `args.hub_private_repo` by default.
            kwargs:
                Arguments of [`~DDPOTrainer.create_model_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`], a future of it if not `blocking`, or `None` on processes that don't push.

        Raises:
            [`~ddpo_trl.hub.PushError`]: If something did not arrive. It says where the model is on the disk.
        """
        self.save_model(_internal_call=True)  # before all else: whatever comes, it is on the disk
        with hub.failures_explained(self.args, self.hub_model_id):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            if not self.is_world_process_zero():
                return None
            if self.hub_model_id is None:
                self.init_hf_repo(token, private)
            self.create_model_card(**kwargs)
            self._finish_current_push()
            push = hub.upload(
                self.args, self.hub_model_id, commit_message, token=token, revision=revision, watched=not blocking
            )
            return push.result() if blocking else push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, which does not know our files, and pushes `training_args.bin` with the token in it."""
        if self._staging is not None or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return  # while staging, the folder is about to be renamed
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        message = f"Training in progress, round {round(self.state.epoch)}"
        with hub.failures_logged(), hub.failures_explained(self.args, self.hub_model_id):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            hub.take_model(checkpoint_folder, self.args.output_dir)
            self.create_model_card()
            pushes = [hub.upload(self.args, self.hub_model_id, message)]
            if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
                pushes.append(hub.upload(self.args, self.hub_model_id, message, checkpoint=checkpoint_folder))
            self.push_in_progress = PushInProgress(pushes)  # after earlier ones, which need not be waited for

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Writes `README.md`, the model card, to `output_dir`.

        Args:
            model_name (`str`, *optional*):
                Name of the model, that of `output_dir` by default.
            dataset_name (`str`, *optional*):
                The dataset of the prompts.
            tags (`str` or `list[str]`, *optional*):
                Tags beside the trainer's own.
        """
        if self.is_world_process_zero():
            name = self.hub_model_id or model_name or hub.wanted_name(self.args)
            given = [tags] if isinstance(tags, str) else tags or []
            held_out = [] if self.eval_scorer is None else self.eval_scorer.names
            write_model_card(
                self.args.output_dir,
                model_name=model_name or name.split("/")[-1],
                repo_id=name,
                policy=self._policy,
                config=self.args,
                prompt=self._example_prompt,
                inputs=self._example_inputs,
                tags=[*self._tag_names, *self._policy.model_tags, *given],
                dataset_name=dataset_name,
                rewards={
                    **self._rewards,
                    **dict.fromkeys(held_out),
                },
                log_history=self.state.log_history,
                paper=self._paper,
            )
