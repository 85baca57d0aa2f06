"""
Pushes to the Hub as overrides of Trainer. Trainer's own would push `training_args.bin`, which contains the token, and
would contact the Hub before it saves the model.
"""

import os
import shlex
import shutil
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ddpo_trl.artifacts.model_card import write_model_card
from ddpo_trl.artifacts.record import MODEL_NAMES, SAMPLES_FOLDER
from ddpo_trl.config import DDPOConfig
from ddpo_trl.descriptions import in_a_line
from ddpo_trl.evaluation.evaluating import EvaluatingTrainer
from ddpo_trl.prompts import PromptPair


logger = logging.get_logger(__name__)

# Checkpoints, which `hub_strategy` decides on, partial files, and single images, which `report.html` contains.
NOT_PUSHED = [f"{PREFIX_CHECKPOINT_DIR}-*", "_*", f"{SAMPLES_FOLDER}/*"]

# One client, whose uploads in the background are made one after another.
HUB = HfApi(library_name="ddpo_trl", library_version=version("ddpo_trl"))


class PushError(RuntimeError):
    """A push failed. The model is still on disk, and the message says where."""


class PushingTrainer(EvaluatingTrainer):
    """Trainer that pushes the trained model to the Hub, with a model card."""

    _tag_names: ClassVar[list[str]]
    _paper: ClassVar[dict[str, str]]
    _example: PromptPair
    _example_inputs: dict[str, Any]
    _staging: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository and the branch if they are missing, and check that they can be written to. Trainer calls
        this at construction, so that a refusal costs no training.

        Raises:
            `ValueError`: If the Hub does not accept the token, the name or the branch.
            `RuntimeError`: If the Hub can't be reached.
        """
        if not self.is_world_process_zero():
            return
        name, token, branch = wanted_name(self.args), token or self.args.hub_token, self.args.hub_revision
        private = self.args.hub_private_repo if private is None else private
        intent = f"The model is to be pushed to {name!r}"
        try:
            repo_id: str = HUB.create_repo(name, token=token, private=private, exist_ok=True).repo_id
            HUB.auth_check(repo_id, token=token, write=True)
            if branch is not None and not branch.startswith("refs/"):  # the reference of a pull request exists
                HUB.create_branch(repo_id, branch=branch, token=token, exist_ok=True)
        except HFValidationError as error:
            raise ValueError(
                f"{intent}, which can't be the name of a repository. Set hub_model_id='you/name', with letters, "
                "digits, '-', '_' and '.'."
            ) from error
        except HfHubHTTPError as error:
            answer = error.server_message or error.response.reason_phrase
            raise ValueError(
                f"{intent}, but the Hub answers {error.response.status_code} ({answer}). Check hub_model_id, "
                "hub_revision and the token (`hf auth login`, HF_TOKEN or hub_token), or train with "
                "push_to_hub=False and push later."
            ) from error
        except (HTTPError, OSError) as error:
            raise RuntimeError(
                f"{intent}, but the Hub can't be reached: {in_a_line(error)}. Train with push_to_hub=False and push "
                "later."
            ) from error
        self.hub_model_id = repo_id
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
        Save to `output_dir` and push it to the Hub, without checkpoints: weights, model card, pictures, settings. All
        processes have to call it.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until the push is complete. If not, a failure is a warning in the log.
            token (`str`, *optional*):
                Token with write permission; by default `args.hub_token` or that of `hf auth login`.
            revision (`str`, *optional*):
                Branch; by default `args.hub_revision` or `"main"`.
            private (`bool`, *optional*):
                Whether the repository is private if it has to be created, `args.hub_private_repo` by default.
            kwargs:
                Arguments of [`~DDPOTrainer.create_model_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`], a future of it if not `blocking`, or `None` on processes that don't push.

        Raises:
            [`~ddpo_trl.artifacts.hub.PushError`]: If the push failed. It says where the model is on disk.
        """
        self.save_model(_internal_call=True)  # first: whatever fails later, the model is on disk
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            if not self.is_world_process_zero():
                return None
            if self.hub_model_id is None:
                self.init_hf_repo(token, private)
            self.create_model_card(**kwargs)
            self._finish_current_push()
            push = self._upload(commit_message, token=token, revision=revision, warn=not blocking)
            return push.result() if blocking else push
        except Exception as error:  # of the HTTP client, the transfer library or a tracker that pushes too
            raise PushError(self._failure(error)) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return  # while staging, the folder is about to be renamed
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        message = f"Training in progress, round {round(self.state.epoch)}"
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            copy_model(checkpoint_folder, self.args.output_dir)
            self.create_model_card()
            pushes = [self._upload(message)]
            if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
                pushes.append(self._upload(f"{message}, checkpoint", checkpoint=checkpoint_folder))
            self.push_in_progress = PushInProgress(pushes)
        except Exception as error:  # training matters more than its pushes
            logger.warning(self._failure(error))

    def _upload(
        self,
        message: str,
        *,
        checkpoint: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        warn: bool = True,
    ) -> "Future[CommitInfo]":
        """Start to upload `output_dir` or a checkpoint in the background, one upload after another."""
        folder, path_in_repo, ignored = self.args.output_dir, None, NOT_PUSHED
        if checkpoint is not None:
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            folder, path_in_repo, ignored = checkpoint, "last-checkpoint" if last else os.path.basename(checkpoint), []
        push: Future[CommitInfo] = HUB.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            ignore_patterns=ignored,
            run_as_future=True,
        )
        if warn:
            push.add_done_callback(self._warn_of_failure)
        return push

    def _warn_of_failure(self, push: "Future[CommitInfo]") -> None:
        error = push.exception()
        if error is not None:
            logger.warning(self._failure(error))

    def _failure(self, error: BaseException) -> str:
        """Return the error, the place of the model, and the command that pushes it later."""
        repo_id = self.hub_model_id or wanted_name(self.args)
        command = ["hf", "upload", repo_id, self.args.output_dir, "."]
        command += [word for pattern in NOT_PUSHED for word in ("--exclude", pattern)]
        if self.args.hub_revision is not None:
            command += ["--revision", self.args.hub_revision]
        return (
            f"The push to {repo_id} failed: {in_a_line(error)}. The trained model is in {self.args.output_dir}. To "
            f"push it later, call trainer.push_to_hub(), or run: {shlex.join(command)}"
        )

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write `README.md`, the model card, to `output_dir`.

        Args:
            model_name (`str`, *optional*):
                Name of the model, by default that of the repository or of `output_dir`.
            dataset_name (`str`, *optional*):
                Hub id of the prompts' dataset.
            tags (`str` or `list[str]`, *optional*):
                Tags in addition to the trainer's own.
        """
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or model_name or wanted_name(self.args)
        given = [tags] if isinstance(tags, str) else tags or []
        held_out = [] if self.eval_scorer is None else self.eval_scorer.names
        write_model_card(
            self.args.output_dir,
            model_name=model_name or name.split("/")[-1],
            repo_id=name,
            policy=self._policy,
            config=self.args,
            prompt=self._example[0],
            inputs=self._example_inputs,
            tags=[*self._tag_names, *self._policy.model_tags, *given],
            dataset_name=dataset_name,
            rewards={**self.scorer.weight_of, **dict.fromkeys(held_out)},
            log_history=self.state.log_history,
            paper=self._paper,
        )


def wanted_name(config: DDPOConfig) -> str:
    """Return `hub_model_id`, or the name of the output folder."""
    return config.hub_model_id or Path(config.output_dir).absolute().name


def copy_model(checkpoint: str, directory: str) -> None:
    """Copy the trained model from a checkpoint, without the files that only a resumed run needs."""
    for name in MODEL_NAMES:
        source, target = os.path.join(checkpoint, name), os.path.join(directory, name)
        if os.path.isdir(source):
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif os.path.isfile(source):
            shutil.copyfile(source, target)
