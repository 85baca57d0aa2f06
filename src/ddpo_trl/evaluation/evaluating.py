"""Evaluation as overrides of Trainer: between rounds, on all processes."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerControl

from ddpo_trl.config import DDPOConfig
from ddpo_trl.evaluation.evaluator import Evaluator, Samples
from ddpo_trl.policy.policy import Policy
from ddpo_trl.prompts import PromptPair, check_inputs, prompt_pairs
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rollout.boundary import RoundCallbacks, StopSignals, agree
from ddpo_trl.rollout.callbacks import RoundProgress
from ddpo_trl.rollout.plan import BatchPlan


class EvaluatingTrainer(Trainer):
    """Trainer that evaluates the pipeline on separate prompts."""

    args: DDPOConfig
    control: TrainerControl
    callback_handler: RoundCallbacks
    plan: BatchPlan
    scorer: RewardScorer
    eval_scorer: RewardScorer | None
    eval_prompts: Sequence[PromptPair] | None
    progress: RoundProgress
    _signals: StopSignals

    @property
    def _policy(self) -> Policy:
        return self.accelerator.unwrap_model(self.model)

    def generate_samples(self, prompts: Dataset | Sequence[str] | None = None) -> Samples:
        """
        Make and score one image per prompt with the pipeline's own scheduler, as its users will.

        The i-th image has the same seed in every call: images before and after training can be compared.

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
        Evaluate the pipeline on `eval_prompts`, with its own scheduler and with the training sampler.

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
              held-out `eval_reward_fn` among them.
            - `{prefix}_reward_sde_gap`: mean reward under the training sampler less `{prefix}_reward`: the part
              of the reported reward that users don't get.
            - `{prefix}_diversity`: root mean square distance, in [0, 1], between images of the same prompt, averaged
              over the prompts that are given at least twice. Absent if there are none.
        """
        last_round = max(0, self.state.global_step // self.plan.updates_per_round - 1)  # whose sampler is evaluated
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
        assert self.args.per_device_eval_batch_size is not None, "DDPOConfig sets it"
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
