"""The repository on the Hub: opened before time is spent on training, and filled so that a failure costs nothing."""

import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import hf_api

from ddpo_trl.artifacts.checkpoints import CONFIG_NAME
from ddpo_trl.artifacts.record import SAMPLES_FOLDER
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.adapter_files import LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME


logger = logging.get_logger(__name__)

# What stays on this machine of a run's folder: checkpoints, which `hub_strategy` sees to, what is unfinished, and the
# images of single rounds, whose sheets are pushed.
NOT_PUSHED = [f"{PREFIX_CHECKPOINT_DIR}-*", "_*", f"{SAMPLES_FOLDER}/*/*", "*.unfinished"]

# The trained model among the files of a checkpoint, in whichever form; folders are those of a whole denoiser.
MODEL_NAMES = (LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME, "unet", "transformer", CONFIG_NAME)


class PushError(RuntimeError):
    """Something did not reach the Hub. It is still on the disk, and the message says where."""


def open_repository(config: DDPOConfig, token: str | None = None, private: bool | None = None) -> str:
    """
    Makes the repository and the branch if they are not there, and finds out whether they may be written to.

    Args:
        config ([`DDPOConfig`]):
            Says which, by its `hub_*` fields.
        token (`str`, *optional*):
            In place of `config.hub_token`.
        private (`bool`, *optional*):
            In place of `config.hub_private_repo`.

    Returns:
        `str`: The id, with the name of the user or organization.

    Raises:
        `ValueError`: If there is no token, or the Hub refuses it, the name or the branch.
        `RuntimeError`: If the Hub can't be reached.
    """
    check_name(config)
    name = wanted_name(config)
    token = token or config.hub_token or get_token()
    if token is None:
        raise ValueError(
            f"The model is to be pushed to {name!r}, but there is no token. Log in with `hf auth login`, set HF_TOKEN "
            "or give hub_token."
        )
    private = config.hub_private_repo if private is None else private
    branch = config.hub_revision
    api = hf_api()
    try:
        repo_id: str = api.create_repo(name, token=token, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, token=token, write=True)
        if branch is not None and not branch.startswith("refs/"):  # the reference of a pull request is there
            api.create_branch(repo_id, branch=branch, token=token, exist_ok=True)
    except HfHubHTTPError as error:
        raise refusal(name, error) from error
    except (httpx2.RequestError, OSError) as error:
        raise RuntimeError(
            f"The model is to be pushed to {name!r}, but the Hub can't be reached: {in_a_line(error)}. Train with "
            "push_to_hub=False, and push later."
        ) from error
    return repo_id


def wanted_name(config: DDPOConfig) -> str:
    """`hub_model_id`, or the name of the output folder."""
    return config.hub_model_id or Path(config.output_dir).absolute().name


def check_name(config: DDPOConfig) -> None:
    """Raises a `ValueError` if no repository can have the name that is wanted."""
    name = wanted_name(config)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        origin = (
            "hub_model_id is" if config.hub_model_id else "hub_model_id is not set, and the output folder is named"
        )
        raise ValueError(
            f"{origin} {name!r}, which can't be the name of a repository. Set hub_model_id='you/name', of letters, "
            "digits, '-', '_' and '.'."
        ) from error


def refusal(name: str, error: HfHubHTTPError) -> Exception:
    """Explain an error of the Hub, with the remedy."""
    says = f"The model is to be pushed to {name!r}, but the Hub answers {error.response.status_code}"
    message = error.server_message or error.response.reason_phrase
    match error.response.status_code:
        case 401:
            return ValueError(f"{says} ({message}): it does not accept the token. Log in again with `hf auth login`.")
        case 403:
            return ValueError(
                f"{says} ({message}): the token may not write there. Give one that may, or set hub_model_id to a "
                "repository of your own."
            )
        case status if status < 500:
            return ValueError(f"{says} ({message}). Check hub_model_id and hub_revision.")
        case _:
            return RuntimeError(f"{says} ({message}). Train with push_to_hub=False, and push later.")


def upload(
    config: DDPOConfig,
    repo_id: str,
    message: str,
    *,
    checkpoint: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    watched: bool = True,
) -> "Future[CommitInfo]":
    """
    Starts to upload a run's folder, or one of its checkpoints. Uploads follow one another, while training goes on.

    Args:
        config ([`DDPOConfig`]):
            Has the folder, and the token and revision where they are not given.
        repo_id (`str`):
            The repository.
        message (`str`):
            Of the commit.
        checkpoint (`str`, *optional*):
            The checkpoint's folder, all of which is uploaded.
        token (`str`, *optional*):
            In place of `config.hub_token`.
        revision (`str`, *optional*):
            In place of `config.hub_revision`.
        watched (`bool`, *optional*, defaults to `True`):
            Whether a failure becomes a warning in the log; else the caller has to ask for the result.
    """
    folder, path_in_repo, ignored = config.output_dir, None, list(NOT_PUSHED)
    if checkpoint is not None:
        last = config.hub_strategy == HubStrategy.CHECKPOINT
        folder, path_in_repo, ignored = checkpoint, "last-checkpoint" if last else os.path.basename(checkpoint), []
        message += ", checkpoint"
    push: Future[CommitInfo] = hf_api().upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=path_in_repo,
        commit_message=message,
        token=token or config.hub_token,
        revision=revision or config.hub_revision,
        ignore_patterns=ignored,
        run_as_future=True,
    )
    if watched:
        push.add_done_callback(partial(warn_of_failure, config=config, repo_id=repo_id))
    return push


def take_model(checkpoint: str, directory: str) -> None:
    """Copies the trained model, and not what only a resumed run needs, from a checkpoint."""
    for name in MODEL_NAMES:
        source, target = os.path.join(checkpoint, name), os.path.join(directory, name)
        if os.path.isdir(source):
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif os.path.isfile(source):
            shutil.copyfile(source, target)


@contextmanager
def failures_explained(config: DDPOConfig, repo_id: str | None) -> Iterator[None]:
    """
    Turns any error into one that says where the model is and how to push it later.

    Raises:
        [`PushError`]
    """
    try:
        yield
    except Exception as error:  # of the HTTP client, of the transfer library, of a tracker that pushes as well
        raise PushError(f"Nothing was pushed: {in_a_line(error)}. {remedy(config, repo_id)}") from error


@contextmanager
def failures_logged() -> Iterator[None]:
    """Turns a [`PushError`] into a line in the log: what was to be pushed matters less than what comes after it."""
    try:
        yield
    except PushError as error:
        logger.error(str(error))


def warn_of_failure(push: Future, config: DDPOConfig, repo_id: str) -> None:
    """Says that a push in the background failed, if it did."""
    error = push.exception()
    if error is not None:
        logger.warning(f"A push to {repo_id} failed: {in_a_line(error)}. {remedy(config, repo_id)}")


def remedy(config: DDPOConfig, repo_id: str | None) -> str:
    """Where the model is, and how it gets to the Hub after all."""
    command = ["hf", "upload", repo_id or wanted_name(config), config.output_dir, "."]
    command += [word for pattern in NOT_PUSHED for word in ("--exclude", pattern)]
    if config.hub_revision is not None:
        command += ["--revision", config.hub_revision]
    return (
        f"Nothing is lost: what was trained is in {config.output_dir}. To push it later, call trainer.push_to_hub(), "
        f"or run: {shlex.join(command)}"
    )


def in_a_line(error: BaseException) -> str:
    """Type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ").rstrip(".")
