"""DDPOTrainer: `transformers.Trainer` with a rollout for a data loader and a policy objective for a loss."""

import copy
import json
import math
import os
import textwrap
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ddpo_trl import advantages
from ddpo_trl.callbacks import RoundProgress
from ddpo_trl.config import DDPOConfig
from ddpo_trl.doctor import log_prob_difference, replay_problem
from ddpo_trl.loader import RolloutLoader
from ddpo_trl.lora import freeze_all_but_denoiser, put_on_adapter
from ddpo_trl.model_card import write_model_card
from ddpo_trl.objectives import importance_sampling, score_function
from ddpo_trl.plan import plan_batches
from ddpo_trl.policy import Policy
from ddpo_trl.prompts import PromptFunction, prompt_pairs, prompt_source
from ddpo_trl.scoring import RewardScorer
from ddpo_trl.seeding import Stream, derived_seed
from ddpo_trl.types import Context, Objective, RewardFunction, Rollout, Transition


PROMPT_STATISTICS_NAME = "prompt_statistics.json"
CONFIG_NAME = "ddpo_config.json"


class Samples(NamedTuple):
    """
    What [`~DDPOTrainer.generate_samples`] returns.

    Args:
        prompts (`list[str]` of length `N`):
            The prompts.
        images (`torch.Tensor` of shape `(N, 3, H, W)`):
            Float32 in [0, 1], on the CPU.
        rewards (`torch.Tensor` of shape `(N, F)`):
            A column per reward function, float64.
    """

    prompts: list[str]
    images: Tensor
    rewards: Tensor


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
            once at construction, on two images made with a single denoising step, so that a wrong signature or return
            value is refused before time is spent.
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
            Prompts of [`~DDPOTrainer.evaluate`] and [`~DDPOTrainer.generate_samples`].
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler; AdamW and a constant rate by default.

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

    def __init__(
        self,
        config: DDPOConfig,
        reward_fn: RewardFunction | Sequence[RewardFunction],
        prompt_fn: PromptFunction | Dataset | Sequence[str],
        pipeline: DiffusionPipeline,
        *,
        peft_config: PeftConfig | None = None,
        eval_prompts: Dataset | Sequence[str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        args = copy.copy(config)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, and DataParallel can't drive a pipeline. Start the "
                "script with `accelerate launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        set_seed(args.seed)  # the adapter is initialised at random
        self.scorer = RewardScorer(reward_fn, args.reward_weights, args.max_workers)
        self.prompts = prompt_source(prompt_fn, args.seed)
        self.eval_prompts = None if eval_prompts is None else prompt_pairs(eval_prompts, "eval_prompts")
        if args.use_lora:
            adapter = put_on_adapter(pipeline, peft_config)
        else:
            adapter = None
            freeze_all_but_denoiser(pipeline, peft_config)
        pipeline = pipeline.to(args.device)
        policy = Policy(pipeline, args, adapter)
        prompt, metadata = self.prompts.preview(1)[0]
        trial_seeds = [derived_seed(args.seed, Stream.EVALUATION, index) for index in range(2)]
        trial = policy.context([prompt] * 2, [metadata] * 2, trial_seeds)
        self.plan = plan_batches(args, policy.survey(trial))
        args.gradient_accumulation_steps = self.plan.micro_batches_per_update
        if args.total_episodes is not None:
            args.num_train_epochs = self.plan.rounds_for(args.total_episodes)

        super().__init__(
            model=policy,
            args=args,
            eval_dataset=self.eval_prompts,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.pipeline = pipeline
        self.progress = RoundProgress(disable=args.disable_tqdm or not self.is_world_process_zero())
        self.remove_callback(ProgressCallback)
        self.add_callback(self.progress)
        self.normalize = self._normalizer()
        self.rollout: Rollout  # of the current round
        self._metrics: defaultdict[str, list[Tensor | float]] = defaultdict(list)
        self._training_since = 0.0
        self._try_reward_function(trial, metadata)

    # ---- The round ----

    def get_train_dataloader(self) -> RolloutLoader:
        """The loader that makes a rollout per epoch. There is no training set but the policy's own samples."""
        return RolloutLoader(
            policy=self._policy,
            prompts=self.prompts,
            scorer=self.scorer,
            normalize=self.normalize,
            advantage_clip=math.inf if self.args.advantage_normalization == "none" else self.args.advantage_clip,
            plan=self.plan,
            seed=self.args.seed,
            accelerator=self.accelerator,
            progress=self.progress,
            on_rollout=self._start_optimising,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Prints the batch plan and what is trained, and trains. See [`~transformers.Trainer.train`]."""
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            print(f"Batch plan\n{self.plan}\nTrained\n  {self._policy.describe()}")
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective of one micro-batch, which `inputs` names by the indices of its transitions."""
        batch = self.rollout.transition(**inputs)
        log_probs, kl = model(
            step=batch.step,
            latents=batch.latents,
            next_latents=batch.next_latents,
            context=batch.context,
            with_reference=self.args.kl_coef > 0,
        )
        objective = self._objective(log_probs, batch)
        loss, metrics = objective.loss, dict(objective.metrics)
        if kl is not None:
            loss = loss + self.args.kl_coef * kl.mean()
            metrics["objective/kl"] = kl.detach().mean()
        if batch.on_policy:
            metrics["val/ratio_deviation"] = self._ratio_deviation(log_probs.detach(), batch)
        for name, value in metrics.items():
            self._metrics[name].append(value)
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    @property
    def _policy(self) -> Policy:
        return self.accelerator.unwrap_model(self.model)

    def _start_optimising(self, rollout: Rollout) -> None:
        self.rollout = rollout
        for name, value in rollout.metrics.items():
            self._metrics[name].append(value)
        self._training_since = time.perf_counter()

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

    def _objective(self, log_probs: Tensor, batch: Transition) -> Objective:
        if self.args.loss_type == "sf":
            return score_function(log_probs, batch.advantages)
        # Before any update π_θ is π_old. Taking it from this very pass keeps the ratio at 1 where other kernels or
        # half precision would move it.
        old_log_probs = log_probs.detach() if batch.on_policy else batch.log_probs
        return importance_sampling(log_probs, old_log_probs, batch.advantages, self.args.cliprange)

    def _ratio_deviation(self, log_probs: Tensor, batch: Transition) -> Tensor:
        """Largest |ratio − 1| of replay to rollout before any update; in the first round a large one is an error."""
        if self.state.global_step == self._initial_global_step:
            difference = log_prob_difference(self.args, log_probs, batch.log_probs, batch.latents)
            if problem := replay_problem(self.args, batch.step, difference, batch.latents.dtype):
                raise RuntimeError(problem)
        return (torch.exp(log_probs - batch.log_probs) - 1).abs().max()

    def _try_reward_function(self, trial: Context, metadata: Any) -> None:
        """Scores two images made in one denoising step: a faulty reward function is refused at construction."""
        with self.accelerator.autocast():
            images = self._policy.sample(trial, max_steps=1).images
        self.scorer.submit(images, trial.prompts, [metadata] * 2, when="trial at construction").result()

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what has gathered since the last call to the training logs."""
        if "loss" in logs:
            logs = {**logs, **self._take_metrics()}
            if start_time is not None:
                rounds = (self.state.global_step - self._initial_global_step) / self.plan.updates_per_round
                logs["eps"] = rounds * self.plan.samples_per_round / (time.time() - start_time)
        super().log(logs, start_time)

    def _take_metrics(self) -> dict[str, float]:
        """Means (for a deviation the maximum) over micro-batches and processes, and empties the store."""
        metrics = {}
        for name, values in self._metrics.items():
            local = torch.tensor([float(value) for value in values], device=self.args.device)
            combine = torch.max if name == "val/ratio_deviation" else torch.mean
            metrics[name] = combine(self.accelerator.gather(combine(local))).item()
        self._metrics.clear()
        metrics["time/training"] = time.perf_counter() - self._training_since
        self._training_since = time.perf_counter()
        return metrics

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
        pairs = self.eval_prompts if prompts is None else prompt_pairs(prompts, "prompts")
        if pairs is None:
            raise ValueError("There are no prompts to sample: give `prompts` here or `eval_prompts` to the trainer.")
        rows: list[tuple[str, Tensor, Tensor]] = []
        with self.accelerator.split_between_processes(list(enumerate(pairs))) as share:
            size = self.args.per_device_sample_batch_size
            for first in range(0, len(share), size):
                rows += self._generate_batch(share[first : first + size])
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        texts, images, rewards = zip(*rows, strict=True)
        return Samples(list(texts), torch.stack(images), torch.stack(rewards))

    def _generate_batch(self, share: Sequence[tuple[int, tuple[str, Any]]]) -> list[tuple[str, Tensor, Tensor]]:
        prompts = [prompt for _, (prompt, _) in share]
        metadata = [metadata for _, (_, metadata) in share]
        seeds = [derived_seed(self.args.seed, Stream.EVALUATION, index) for index, _ in share]
        with self.accelerator.autocast():
            images = self._policy.generate(self._policy.context(prompts, metadata, seeds))
        rewards = self.scorer.submit(images, prompts, metadata, when="evaluation").result()
        return list(zip(prompts, images.cpu(), rewards, strict=True))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Mean reward of [`~DDPOTrainer.generate_samples`].

        Args:
            eval_dataset (`datasets.Dataset` or `list[str]`, *optional*):
                The prompts, `eval_prompts` by default.
            ignore_keys (`list[str]`, *optional*):
                Not used: there are no model outputs to drop.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics.

        Returns:
            `{prefix}_reward`, `{prefix}_reward_std` and `{prefix}_rewards/<name>/mean`.
        """
        rewards = self.generate_samples(eval_dataset).rewards
        totals = self.scorer.total(rewards)
        metrics = {
            f"{metric_key_prefix}_reward": totals.mean().item(),
            f"{metric_key_prefix}_reward_std": totals.std(correction=0).item(),
        }
        for column, name in enumerate(self.scorer.names):
            metrics[f"{metric_key_prefix}_rewards/{name}/mean"] = rewards[:, column].mean().item()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = output_dir or self.args.output_dir
        os.makedirs(directory, exist_ok=True)
        self._policy.save(directory)
        with open(os.path.join(directory, CONFIG_NAME), "w") as file:
            file.write(self.args.to_json_string())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if isinstance(self.normalize, advantages.PromptStatistics) and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            with open(os.path.join(self._get_output_dir(trial), folder, PROMPT_STATISTICS_NAME), "w") as file:
                json.dump(self.normalize.state_dict(), file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._policy.load(resume_from_checkpoint)
        if isinstance(self.normalize, advantages.PromptStatistics):
            with open(os.path.join(resume_from_checkpoint, PROMPT_STATISTICS_NAME)) as file:
                self.normalize.load_state_dict(json.load(file))

    def _load_best_model(self) -> None:
        self._policy.load(self.state.best_model_checkpoint)

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
            write_model_card(
                os.path.join(self.args.output_dir, "README.md"),
                model_name=model_name or os.path.basename(os.path.normpath(self.args.output_dir)),
                base_model=self.pipeline.name_or_path,
                pipeline_class=type(self.pipeline).__name__,
                tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
                dataset_name=dataset_name,
                reward_names=self.scorer.names,
                log_history=self.state.log_history,
                settings=self.args,
                paper=self._paper,
            )
