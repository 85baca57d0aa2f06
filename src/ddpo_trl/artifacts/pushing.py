"""Pushes to the Hub as overrides of Trainer: the model card, the adapter and the pictures, and nothing secret."""

from typing import Any, ClassVar

from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ddpo_trl.artifacts import hub
from ddpo_trl.artifacts.model_card import write_model_card
from ddpo_trl.evaluation.evaluating import EvaluatingTrainer
from ddpo_trl.prompts import PromptPair


class PushingTrainer(EvaluatingTrainer):
    """Trainer that pushes what it trained to the Hub, with a model card."""

    _tag_names: ClassVar[list[str]]
    _paper: ClassVar[dict[str, str]]
    _example: PromptPair
    _example_inputs: dict[str, Any]
    _staging: str | None

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
        Saves to `output_dir`, and pushes that to the Hub, except for the checkpoints: weights, model card, pictures,
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
            [`~ddpo_trl.artifacts.hub.PushError`]: If something did not arrive. It says where the model is on the disk.
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
                prompt=self._example[0],
                inputs=self._example_inputs,
                tags=[*self._tag_names, *self._policy.model_tags, *given],
                dataset_name=dataset_name,
                rewards={
                    **self.scorer.weight_of,
                    **dict.fromkeys(held_out),
                },
                log_history=self.state.log_history,
                paper=self._paper,
            )
