"""Shows what a run makes: sample images in the trackers, and all that one wants to look at later on the disk."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ddpo_trl.artifacts import record
from ddpo_trl.artifacts.record import Kind, LoggedImage
from ddpo_trl.artifacts.report import write_report
from ddpo_trl.config import DDPOConfig
from ddpo_trl.distributed import gather
from ddpo_trl.evaluation.evaluator import Evaluator
from ddpo_trl.prompts import PromptPair
from ddpo_trl.rollout.records import Rollout
from ddpo_trl.seeding import randomness_untouched


# Name of the table, and of the images' group in tensorboard.
SAMPLES = "samples"


class RunRecorder(TrainerCallback):
    """
    Keeps the record of a run in `output_dir`, and logs sample images before training, every `log_images_rounds` rounds
    and at the end, to the disk and to the trackers of `report_to`: the same fixed prompts and seeds, made with the
    pipeline's own scheduler, and the best, median and worst samples of the round over all processes.

    All processes take part; the first one writes. Images of a round are those that its rollout holds anyway.

    Args:
        evaluator (`Callable[[], Evaluator]`):
            Gives what makes and scores the fixed images.
        pairs (`Sequence[tuple[str, Any]]`):
            The fixed prompts and their metadata.
        trackers (`Sequence[~transformers.TrainerCallback]`):
            The Trainer's callbacks, those of the trackers among them: images go where they send the figures.

    Attributes:
        rollout ([`~ddpo_trl.rollout.records.Rollout`], *optional*):
            Of the current round; the trainer sets it.
    """

    def __init__(
        self,
        evaluator: Callable[[], Evaluator],
        pairs: Sequence[PromptPair],
        trackers: Sequence[TrainerCallback],
    ):
        self.evaluator = evaluator
        self.pairs = pairs
        self.trackers = trackers
        self.rollout: Rollout | None = None
        self._earlier: list[dict[str, Any]] = []  # logs of earlier calls of `train`, and their optimizer steps
        self._earlier_steps = 0
        self._current: tuple[str, TrainerState] | None = None  # of this call: the folder and the state

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the record of earlier calls of `train`."""
        return {"earlier_logs": self._earlier, "earlier_steps": self._earlier_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where [`~RunRecorder.state_dict`] was taken."""
        self._earlier, self._earlier_steps = state["earlier_logs"], state["earlier_steps"]

    def on_train_begin(self, args: DDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rollout = None
        if not state.global_step:  # not resumed
            self._append_to_record(args)
        self._current = args.output_dir, state
        if not state.is_world_process_zero:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        record.write_settings(args.output_dir, args)
        record.write_environment(args.output_dir, args.device)
        record.write_metrics(args.output_dir, self._history(state), args.updates_per_round)
        # What a run that is resumed here has made of this round is complete: there is no rollout to make it again.
        done = self._rounds_done(args, state)
        record.remove_rounds_from(args.output_dir, done + 1 if done else 0)

    def _append_to_record(self, args: DDPOConfig) -> None:
        """A further call of `train` counts on, if it writes to the same folder."""
        if self._current is None or self._current[0] != args.output_dir:
            self._earlier, self._earlier_steps = [], 0
            return
        state = self._current[1]
        self._earlier = self._history(state)
        rounds = math.ceil(state.global_step / args.updates_per_round)
        self._earlier_steps += rounds * args.updates_per_round

    def _history(self, state: TrainerState) -> list[dict[str, Any]]:
        """All logs of the record, with steps that count on from one call of `train` to the next."""
        own = [{**log, "step": log["step"] + self._earlier_steps} for log in state.log_history]
        return [*self._earlier, *own]

    def _rounds_done(self, args: DDPOConfig, state: TrainerState) -> int:
        """Between rounds, how many there are in the record."""
        return (self._earlier_steps + state.global_step) // args.updates_per_round

    def on_epoch_begin(self, args: DDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The round before is over, its figures are logged: making images has no part in its times.
        if args.log_images_rounds and self._rounds_done(args, state) % args.log_images_rounds == 0:
            self._log_images(args, state)

    def on_log(
        self,
        args: DDPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._current is None:
            return  # `evaluate` before training: the folder may hold the record of another run
        if state.is_world_process_zero:
            record.write_metrics(args.output_dir, self._history(state), args.updates_per_round)
        # Trainer's last word: the trackers are still open, and the best checkpoint is not loaded yet.
        if logs is not None and "train_runtime" in logs:
            if args.log_images_rounds:
                self._log_images(args, state)
            if state.is_world_process_zero:
                write_report(args.output_dir)

    def _log_images(self, args: DDPOConfig, state: TrainerState) -> None:
        round = self._rounds_done(args, state)
        if round and self.rollout is None:
            return  # the run was resumed here
        evaluator = dataclasses.replace(self.evaluator(), drop_invalid=True)  # a picture without a reward is no error
        with randomness_untouched(args.device):
            images = [*fixed_images(evaluator, self.pairs), *round_images(evaluator, self.rollout, args)]
        if not state.is_world_process_zero:
            return
        record.write_samples(args.output_dir, round, images)
        record.write_reward_curve(args.output_dir, self._history(state), evaluator.scorer.names)
        if round:
            record.write_before_after(args.output_dir, round)
        for tracker in self.trackers:
            send(tracker, round, images, state.global_step)


def fixed_prompts(
    config: DDPOConfig,
    eval_prompts: Sequence[PromptPair] | None,
    preview: Callable[[int], list[PromptPair]],
    prompts_per_round: int,
) -> list[PromptPair]:
    """
    The prompts whose images are logged again and again, the same on all processes, which have to call it all.

    Args:
        config ([`DDPOConfig`]):
            Says how many. None if no images are logged.
        eval_prompts (`Sequence[tuple[str, Any]]`, *optional*):
            The first of these are taken, if there are any.
        preview (`Callable[[int], list[tuple[str, Any]]]`):
            Else those that training begins with: gives so many, the same on all processes.
        prompts_per_round (`int`):
            More are not taken of them: the first round has to draw what was previewed.
    """
    if not config.log_images_rounds:
        return []
    if eval_prompts is not None:
        return [eval_prompts[index] for index in range(min(config.num_logged_images, len(eval_prompts)))]
    return preview(min(config.num_logged_images, prompts_per_round))


# ---- The images ----


def fixed_images(evaluator: Evaluator, pairs: Sequence[PromptPair]) -> list[LoggedImage]:
    """Make the images of the fixed prompts, with the evaluation's seeds. All processes have to call it."""
    samples = evaluator.generate(pairs)
    return [
        logged_image(evaluator, "fixed", index, image, prompt, evaluator.image_seed(index), rewards)
        for index, (prompt, image, rewards) in enumerate(zip(*samples, strict=True))
    ]


def round_images(evaluator: Evaluator, rollout: Rollout | None, config: DDPOConfig) -> list[LoggedImage]:
    """The best, median and worst of a round's samples over all processes, which have to call it all."""
    if rollout is None:
        return []
    totals = gather(evaluator.accelerator, rollout.rewards)
    own = len(rollout.rewards)
    first = evaluator.accelerator.process_index * own
    images = []
    for kind, indices in places(totals, config.num_logged_images // 2).items():
        for index, sample in enumerate(indices):
            if first <= sample < first + own:
                batch, row = rollout.origin(sample - first), (sample - first) % len(rollout.batches[0].context)
                context = batch.context
                images.append(
                    logged_image(
                        evaluator,
                        kind,
                        index,
                        batch.images[row],
                        context.prompts[row],
                        context.seeds[row],
                        rollout.scores[sample - first],
                    )
                )
    kinds = list(record.SECTIONS)
    return sorted(gather_object(images), key=lambda image: (kinds.index(image.kind), image.index))


def places(rewards: Tensor, count: int) -> dict[Kind, list[int]]:
    """
    Which samples are the best, those in the middle and the worst; the best, the median and the worst of all first.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            NaN for samples that have none; they are left out.
        count (`int`):
            How many of each. Fewer if they would overlap, but at least one.
    """
    order = [index for index in rewards.argsort(descending=True, stable=True).tolist() if not rewards[index].isnan()]
    count = max(1, min(count, len(order) // 3))
    middle = (len(order) - 1) / 2
    from_the_middle = sorted(range(len(order)), key=lambda place: abs(place - middle))
    return {
        "best": order[:count],
        "median": [order[place] for place in from_the_middle[:count]],
        "worst": order[::-1][:count],
    }


def logged_image(
    evaluator: Evaluator, kind: Kind, index: int, image: Tensor, prompt: str, seed: int, rewards: Tensor
) -> LoggedImage:
    """An image with its rewards, one of each function."""
    return LoggedImage(
        kind=kind,
        index=index,
        frames=record.frames(image),
        prompt=prompt,
        seed=seed,
        reward=record.valid(evaluator.scorer.total(rewards).item()),
        rewards={
            name: record.valid(reward) for name, reward in zip(evaluator.scorer.names, rewards.tolist(), strict=True)
        },
    )


# ---- The trackers ----


def send(tracker: TrainerCallback, round: int, images: Sequence[LoggedImage], step: int) -> None:
    """
    Logs images to the run that a tracker's callback has opened; nothing if it is no tracker that takes any.

    Args:
        tracker (`~transformers.TrainerCallback`):
            One of the Trainer's.
        round (`int`):
            Rounds done.
        images (`Sequence[LoggedImage]`):
            The images.
        step (`int`):
            The Trainer's step, at which the figures are logged too.
    """
    match tracker:
        case WandbCallback():
            import wandb

            log_table(wandb, round, images, step)
        case TrackioCallback():
            import trackio

            log_table(trackio, round, images, step)
        case TensorBoardCallback():
            writer = tracker.tb_writer
            for image in images:  # a name for each, so that one can be followed through the rounds
                writer.add_image(f"{SAMPLES}/{image.name}", np.asarray(image.still), step, dataformats="HWC")
            writer.add_text(SAMPLES, markdown(images), step)


def log_table(tracker: Any, round: int, images: Sequence[LoggedImage], step: int) -> None:
    """
    Logs a table with a row per image.

    Args:
        tracker (module):
            `wandb` or `trackio`, which has the same names.
        round, images, step:
            As for [`send`].
    """
    names = list(images[0].rewards)
    rows = [
        [
            round,
            image.name,
            tracker.Image(image.still, caption=image.prompt),
            image.prompt,
            image.reward,
            *(image.rewards[name] for name in names),
            str(image.seed),  # as a number a browser would round it
        ]
        for image in images
    ]
    columns = ["round", "name", "image", "prompt", "reward", *(f"rewards/{name}" for name in names), "seed"]
    table = tracker.Table(columns=columns, data=rows)
    tracker.log({SAMPLES: table, "train/global_step": step})


def markdown(images: Sequence[LoggedImage]) -> str:
    """A table of what belongs to the images."""
    lines = ["| image | prompt | reward | seed |", "|---|---|---|---|"]
    for image in images:
        reward = "" if image.reward is None else f"{image.reward:.4g}"
        prompt = " ".join(image.prompt.replace("|", "\\|").split())
        lines.append(f"| {image.name} | {prompt} | {reward} | {image.seed} |")
    return "\n".join(lines)
