"""Checkpoints as overrides of Trainer: between rounds, complete or absent, resumed only by the run that wrote them."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from ddpo_trl.artifacts import checkpoints, record, resuming
from ddpo_trl.artifacts.checkpoints import PLAN_NAME, RUN_NAME
from ddpo_trl.artifacts.environment import version
from ddpo_trl.artifacts.hub import PushError, PushingTrainer
from ddpo_trl.descriptions import DIGITS, code_digest, described
from ddpo_trl.policy.pipeline import ingredients
from ddpo_trl.policy.policy import Policy
from ddpo_trl.prompts import FunctionPrompts, PromptKeyFunction, PromptSource, fingerprint
from ddpo_trl.rollout.advantages import Advantages
from ddpo_trl.update import optimizers


logger = logging.get_logger(__name__)

PROMPT_STATISTICS_NAME = "prompt_statistics.json"
PROMPTS_NAME = "prompts.pt"


class SavingTrainer(PushingTrainer):
    """
    Trainer that saves rounds: the adapter, the optimizer, and the state of the run.

    Attributes:
        plan, prompts, eval_prompts, prompt_key_fn, advantages, episodes:
            Parts of the run whose state belongs to a checkpoint.
    """

    prompts: PromptSource
    prompt_key_fn: PromptKeyFunction
    advantages: Advantages
    episodes: int
    _own_optimizer: bool
    _ingredients: dict[str, Any]
    _staging: str | None = None  # folder in which a checkpoint is being written
    _trained_in: str | None = None  # output_dir of an earlier call of `train`

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the trained weights, for plain diffusers to load, with the settings; and push them if `args.push_to_hub`.

        All processes have to call it; one of them writes. A failed push is logged as an error, not raised.

        Args:
            output_dir (`str`, *optional*):
                Target directory, `args.output_dir` by default.
        """
        directory = output_dir or self.args.output_dir
        os.makedirs(directory, exist_ok=True)
        self._policy.save(directory, write=self.args.should_save)
        if self.args.should_save:
            record.write_settings(directory, self.args)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except PushError as error:
                logger.error(str(error))

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
        """Write a checkpoint to a staging folder and rename it when complete, so that a kill leaves no partial one."""
        run_directory = self._get_output_dir(trial)
        self._staging = os.path.join(run_directory, checkpoints.STAGING_NAME)
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = (os.path.join(place, folder) for place in (self._staging, run_directory))
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)  # of a killed run
            os.makedirs(self._staging)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_model_checkpoint == staged:
            self.state.best_model_checkpoint = final
        if self.args.should_save:
            self._save_round(Path(staged))
        self.accelerator.wait_for_everyone()  # all have written their part
        if self.args.should_save:
            checkpoints.publish(staged, final)
            rotate_checkpoints(run_directory, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _save_round(self, directory: Path) -> None:
        """Write the state that Trainer does not know: batch plan, identity of the run, prompts, statistics."""
        self.state.save_to_json(str(directory / TRAINER_STATE_NAME))  # with the final name of the best checkpoint
        (directory / PLAN_NAME).write_text(json.dumps(dataclasses.asdict(self.plan)))
        run = {"episodes": self.episodes, **self._identity, **self._optimizer_record()}
        (directory / RUN_NAME).write_text(json.dumps(run))
        torch.save(self.prompts.state_dict(), directory / PROMPTS_NAME)
        if self.advantages.statistics:
            (directory / PROMPT_STATISTICS_NAME).write_text(json.dumps(self.advantages.state_dict()))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._policy.load(resume_from_checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        for group in (optimizer or self.optimizer).param_groups:
            group.setdefault("initial_lr", copy.deepcopy(group["lr"]))  # ReduceLROnPlateau does not record it
        # Before a checkpoint's replace them. DeepSpeed passes its own optimizer.
        self._hyperparameters = optimizers.hyperparameters(optimizer or self.optimizer)
        return scheduler

    def _load_callback_state(self) -> None:
        for callback in self.callback_handler.callbacks:
            saved = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                saved["args"] = callback.state()["args"]  # as given now, not those of the checkpoint
        super()._load_callback_state()

    def _ingredients_of(self, policy: Policy) -> dict[str, Any]:
        """Describe the run beyond its settings, before weights are sharded and functions count their calls."""
        functions: dict[str, Any] = dict(zip(self.scorer.names, self.scorer.functions, strict=True))
        if isinstance(self.prompts, FunctionPrompts):
            functions["prompt_fn"] = self.prompts.prompt_fn
        code = {f"{resuming.CODE} {name}": code_digest(function)[:DIGITS] for name, function in functions.items()}
        return {**ingredients(policy.pipeline), **policy.adapter_record, **code}

    def _optimizer_record(self) -> dict[str, Any]:
        return optimizers.record(self.optimizer, self.lr_scheduler, self._hyperparameters)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """Identity of the run beyond its settings, for `run.json`."""
        return {
            "rewards": self.scorer.weight_of,
            "prompts": self.prompts.fingerprint,
            "eval_prompts": None if self.eval_prompts is None else fingerprint(self.eval_prompts),
            "prompt_key_fn": described(self.prompt_key_fn),
            "ingredients": self._ingredients,
            "versions": {
                "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
            },
        }

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None = None) -> str | None:
        """
        Return the checkpoint that [`~DDPOTrainer.train`] resumes from; `None` for a new run.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As for [`~DDPOTrainer.train`].

        Raises:
            `ValueError`: If there is no such checkpoint, if it can't be continued with these settings, or if
                `output_dir` contains another run.
        """
        directory = self.args.output_dir
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = checkpoints.to_resume(asked, directory, own_folder=self._trained_in == directory)
        if checkpoint is not None:
            self._changes_since(resuming.read(checkpoint))
        elif asked:
            logger.warning(f"There is no checkpoint in {directory} to resume from: starting from the beginning.")
        return checkpoint

    def _changes_since(self, saved: resuming.SavedRun) -> list[str]:
        """Return a sentence per difference of the resumed run; raise a `ValueError` if it can't be continued."""
        settings = resuming.with_plan(json.loads(self.args.to_json_string()), dataclasses.asdict(self.plan))
        return [
            *resuming.setting_changes(saved.settings, settings, self._own_optimizer),
            *resuming.run_changes(saved.run, self._identity, self.args.resume_with_new_rewards),
        ]

    def _make_room(self, checkpoint: str | None) -> None:
        """Move everything that this run does not continue out of the way."""
        directory = self.args.output_dir
        if self.is_world_process_zero():
            names = record.RUN_NAMES if checkpoint is None and record.has_rounds(directory) else ()
            moved = checkpoints.make_room(directory, checkpoint, names)
            if moved:
                logger.warning(moved)
        self._trained_in = directory
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = resuming.read(checkpoint)
        optimizers.check_same(saved.run, self._optimizer_record())
        super()._load_optimizer_and_scheduler(checkpoint)
        changes = optimizers.keep_changed(
            self.optimizer, self.lr_scheduler, self._hyperparameters, saved.run["groups"]
        )
        if not self._own_optimizer:
            changes = []  # the changes of the settings say it
        for change in [*self._changes_since(saved), *changes]:
            logger.warning(f"Resuming from {checkpoint}: {change}")
        self._load_round(checkpoint)  # here because Trainer calls this for all ways to wrap a model

    def _load_round(self, checkpoint: str) -> None:
        """Read what [`_save_round`] wrote."""
        saved = resuming.read(checkpoint)
        self.episodes = saved.run["episodes"]
        prompts = torch.load(os.path.join(checkpoint, PROMPTS_NAME), weights_only=True)
        if saved.run["prompts"] == self.prompts.fingerprint:
            self.prompts.load_state_dict(prompts)
        if self.advantages.statistics and saved.settings["advantage_normalization"] == "prompt":
            self._load_prompt_statistics(Path(checkpoint, PROMPT_STATISTICS_NAME), saved.run)
        resuming.find_best(self.state, checkpoint, saved.settings, vars(self.args))
        self._load_rng_state(checkpoint)  # Trainer does so in the next round, which a finished run does not have

    def _load_prompt_statistics(self, path: Path, saved: dict[str, Any]) -> None:
        """Restore the remembered rewards, unless they are of other functions, weights or keys."""
        states = checkpoints.read_json(path)
        own = self._identity
        names_only = bool(self.advantages.normalize_each)  # weights have no effect on separate statistics
        rewards, before = ([*run["rewards"]] if names_only else run["rewards"] for run in (own, saved))
        same_key = own["prompt_key_fn"] == saved["prompt_key_fn"]
        if rewards == before and same_key and len(states) == len(self.advantages.statistics):
            self.advantages.load_state_dict(states)
            return
        logger.warning(
            f"{path} has {len(states)} statistics of {saved['rewards']} by {saved['prompt_key_fn']}, and this run has "
            f"{len(self.advantages.statistics)} of {own['rewards']} by {own['prompt_key_fn']}: they are not used."
        )

    def _load_best_model(self) -> None:
        self._policy.load(self.state.best_model_checkpoint)
