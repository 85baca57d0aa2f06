"""Checkpoints as overrides of Trainer: between rounds, complete or absent, resumed only by the run that wrote them."""

import copy
import dataclasses
import functools
import json
import os
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from ddpo_trl.artifacts import checkpoints, hub, record, resuming
from ddpo_trl.artifacts.checkpoints import CONFIG_NAME, PLAN_NAME
from ddpo_trl.artifacts.pushing import PushingTrainer
from ddpo_trl.artifacts.tracking import RunRecorder
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
        plan, prompts, eval_prompts, prompt_key_fn, advantages, recorder, episodes:
            Parts of the run whose state belongs to a checkpoint.
    """

    prompts: PromptSource
    prompt_key_fn: PromptKeyFunction
    advantages: Advantages
    recorder: RunRecorder
    episodes: int
    _own_optimizer: bool
    _ingredients: dict[str, Any]
    _staging: str | None = None  # where a checkpoint is being written
    _trained_in: str | None = None  # output_dir of an earlier call of `train`

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
        """Write the state that Trainer does not know: batch plan, prompts, remembered rewards."""
        self.state.save_to_json(os.path.join(directory, TRAINER_STATE_NAME))  # with the final name of the best one
        with open(os.path.join(directory, PLAN_NAME), "w") as file:
            json.dump(dataclasses.asdict(self.plan), file)
        run = {
            "episodes": self.episodes,
            **self._what_is_run,
            **self._optimizer_record(),
            **self.recorder.state_dict(),
        }
        with open(os.path.join(directory, resuming.RUN_NAME), "w") as file:
            json.dump(run, file)
        torch.save(self.prompts.state_dict(), os.path.join(directory, PROMPTS_NAME))
        if self.advantages.statistics:
            with open(os.path.join(directory, PROMPT_STATISTICS_NAME), "w") as file:
                json.dump(self.advantages.state_dict(), file)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._policy.load(resume_from_checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        for group in (optimizer or self.optimizer).param_groups:
            group.setdefault("initial_lr", copy.deepcopy(group["lr"]))  # ReduceLROnPlateau does not write it down
        # Before a checkpoint's take their place. DeepSpeed hands in its own optimizer.
        self._hyperparameters = optimizers.hyperparameters(optimizer or self.optimizer)
        return scheduler

    def _load_callback_state(self) -> None:
        for callback in self.callback_handler.callbacks:
            saved = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                saved["args"] = callback.state()["args"]  # as given now: the checkpoint's would take their place
        super()._load_callback_state()

    def _ingredients_of(self, policy: Policy) -> dict[str, Any]:
        """Parts of the run beyond its settings, before weights are sharded and functions count their calls."""
        functions: dict[str, Any] = dict(zip(self.scorer.names, self.scorer.functions, strict=True))
        if isinstance(self.prompts, FunctionPrompts):
            functions["prompt_fn"] = self.prompts.prompt_fn
        code = {f"The code of {name}": code_digest(function)[:DIGITS] for name, function in functions.items()}
        return {**ingredients(policy.pipeline), **policy.adapter_record, **code}

    def _optimizer_record(self) -> dict[str, Any]:
        return optimizers.record(self.optimizer, self.lr_scheduler, self._hyperparameters)

    @functools.cached_property
    def _what_is_run(self) -> dict[str, Any]:
        """Return the identity of the run beyond its settings, as a checkpoint holds it."""
        return {
            "rewards": self.scorer.weight_of,
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
            logger.warning(f"There is no checkpoint in {directory} to resume from: starting from the beginning.")
        return checkpoint

    def _changes_since(self, checkpoint: str) -> list[str]:
        """Return a sentence per difference of the resumed run; raise if it can't be continued."""
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
            optimizers.check_same(run, self._optimizer_record())
        super()._load_optimizer_and_scheduler(checkpoint)
        before = optimizers.hyperparameters(self.optimizer) if run is None else run["groups"]
        changes = optimizers.keep_changed(self.optimizer, self.lr_scheduler, self._hyperparameters, before)
        changes = changes if self._own_optimizer else []  # else the settings' changes say it
        for change in [*self._changes_since(checkpoint), *changes]:
            logger.warning(f"Resuming from {checkpoint}: {change}")
        self._load_round(checkpoint)  # here because all ways to wrap a model come by

    def _load_round(self, checkpoint: str) -> None:
        """Reads what [`_save_round`] wrote."""
        saved = resuming.read(checkpoint)
        # Before checkpoints held the count, the rounds of a run were all of one size.
        rounds = self.state.global_step // self.plan.updates_per_round
        self.episodes = (saved.run or {}).get("episodes", rounds * self.plan.samples_per_round)
        prompts = torch.load(os.path.join(checkpoint, PROMPTS_NAME), weights_only=True)
        if saved.run is None or saved.run["prompts"] == self.prompts.fingerprint:
            self.prompts.load_state_dict(prompts)
        if self.advantages.statistics and saved.settings.get("advantage_normalization", "prompt") == "prompt":
            self._load_prompt_statistics(os.path.join(checkpoint, PROMPT_STATISTICS_NAME), saved.run)
        self.recorder.load_state_dict(saved.run or {"earlier_logs": [], "earlier_steps": 0})
        resuming.find_best(self.state, checkpoint, saved.settings, vars(self.args))
        self._load_rng_state(checkpoint)  # Trainer does so in the next round, which a finished run does not have

    def _load_prompt_statistics(self, path: str, run: dict[str, Any] | None) -> None:
        with open(path) as file:
            states = json.load(file)
        own, before = self.scorer.weight_of, self.scorer.weight_of if run is None else run["rewards"]
        key_fn = described(self.prompt_key_fn)
        if len(states) != len(self.advantages.statistics):
            logger.warning(
                f"{path} has the remembered rewards of {len(states)} sums or reward functions, and this run has "
                f"{len(self.advantages.statistics)}: they are forgotten."
            )
        elif [*own] != [*before] if self.advantages.normalize_each else own != before:
            logger.warning(
                f"{path} has the remembered rewards of {before}, and this run has {own}: they are forgotten."
            )
        elif run is not None and run.get("prompt_key_fn", key_fn) != key_fn:
            logger.warning(
                f"{path} has rewards remembered by {run['prompt_key_fn']}, and prompt_key_fn is {key_fn}: they are "
                "forgotten."
            )
        else:
            self.advantages.load_state_dict(states)

    def _load_best_model(self) -> None:
        self._policy.load(self.state.best_model_checkpoint)
