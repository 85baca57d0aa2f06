"""Record of a run: sample images in the trackers, and files in `output_dir`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ddpo_trl.artifacts import record
from ddpo_trl.artifacts.plots import can_draw, save_reward_curve
from ddpo_trl.artifacts.record import Kind, LoggedImage
from ddpo_trl.artifacts.report import write_report
from ddpo_trl.config import DDPOConfig
from ddpo_trl.distributed import gather
from ddpo_trl.evaluation.evaluator import Evaluator
from ddpo_trl.prompts import PromptPair
from ddpo_trl.rollout.records import Rollout
from ddpo_trl.seeding import randomness_untouched


logger = logging.get_logger(__name__)

# Name of the table in wandb and trackio, and of the group of images in tensorboard.
SAMPLES = "samples"


class RunRecorder(TrainerCallback):
    """
    Callback that writes the record of a run, and logs sample images before training, every `log_images_rounds` rounds
    and at the end: fixed prompts and seeds with the pipeline's own scheduler, and the best, median and worst samples
    of the round over all processes.

    All processes take part; the first one writes. Samples of a round are taken from its rollout.

    Args:
        evaluator (`Callable[[], Evaluator]`):
            Returns the evaluator that makes and scores the fixed images.
        pairs (`Sequence[tuple[str, Any]]`):
            Fixed prompts and their metadata.
        trackers (`Sequence[~transformers.TrainerCallback]`):
            Callbacks of the Trainer, which include those of the trackers in `report_to`.

    Attributes:
        rollout ([`~ddpo_trl.rollout.records.Rollout`], *optional*):
            Rollout of the current round, set by the trainer.
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
        self._has_begun = False
        self._draws = can_draw()

    def on_train_begin(self, args: DDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rollout = None
        self._has_begun = True
        if not state.is_world_process_zero:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        record.write_settings(args.output_dir, args)
        record.write_environment(args.output_dir, args.device)
        if args.log_images_rounds and not self._draws:
            logger.warning(
                f"{record.REWARD_CURVE_NAME} and {record.BEFORE_AFTER_NAME} are not drawn, since matplotlib is not "
                "installed: pip install 'ddpo_trl[plots]'. report.html shows the same."
            )
        record.write_metrics(args.output_dir, state.log_history, args.updates_per_round)
        # The images of the resumed round are complete; there is no rollout to make them from again.
        done = state.global_step // args.updates_per_round
        record.remove_rounds_from(args.output_dir, done + 1 if done else 0)

    def on_epoch_begin(self, args: DDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The previous round is over and logged: making images does not count in its times.
        if args.log_images_rounds and state.global_step // args.updates_per_round % args.log_images_rounds == 0:
            self._log_images(args, state)

    def on_log(
        self,
        args: DDPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._has_begun:
            return  # `evaluate` before training: the folder may hold the record of another run
        if state.is_world_process_zero:
            record.write_metrics(args.output_dir, state.log_history, args.updates_per_round)
        # Trainer's last log: the trackers are still open, and the best checkpoint is not loaded yet.
        if logs is not None and "train_runtime" in logs:
            if args.log_images_rounds:
                self._log_images(args, state)
            if state.is_world_process_zero:
                write_report(args.output_dir)

    def _log_images(self, args: DDPOConfig, state: TrainerState) -> None:
        round = state.global_step // args.updates_per_round
        if round and self.rollout is None:
            return  # the run was resumed here
        evaluator = dataclasses.replace(self.evaluator(), drop_invalid=True)  # show images without a reward too
        with randomness_untouched(args.device):
            images = [*fixed_images(evaluator, self.pairs), *round_images(evaluator, self.rollout, args)]
        if not state.is_world_process_zero:
            return
        record.write_samples(args.output_dir, round, images)
        if round and self._draws:
            names = evaluator.scorer.names
            label = names[0] if len(names) == 1 else "reward"
            save_reward_curve(state.log_history, Path(args.output_dir, record.REWARD_CURVE_NAME), label)
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
    Return the prompts of the fixed images, equal on all processes; empty if no images are logged.

    These are the first evaluation prompts, or else the first training prompts. `preview(n)`, which all processes have
    to call, returns at most the prompts of the first round (`prompts_per_round`).
    """
    if not config.log_images_rounds:
        return []
    if eval_prompts is not None:
        return [eval_prompts[index] for index in range(min(config.num_logged_images, len(eval_prompts)))]
    return preview(min(config.num_logged_images, prompts_per_round))


# ---- Images ----


def fixed_images(evaluator: Evaluator, pairs: Sequence[PromptPair]) -> list[LoggedImage]:
    """Make the images of the fixed prompts, with the evaluation's seeds. All processes have to call it."""
    samples = evaluator.generate(pairs)
    return [
        logged_image(evaluator, "fixed", index, image, prompt, evaluator.image_seed(index), rewards)
        for index, (prompt, image, rewards) in enumerate(zip(*samples, strict=True))
    ]


def round_images(evaluator: Evaluator, rollout: Rollout | None, config: DDPOConfig) -> list[LoggedImage]:
    """Collect the best, median and worst samples of a round. All processes have to call it."""
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
                image, prompt, seed = batch.images[row], batch.context.prompts[row], batch.context.seeds[row]
                rewards = rollout.scores[sample - first]
                images.append(logged_image(evaluator, kind, index, image, prompt, seed, rewards))
    kinds = get_args(Kind)
    return sorted(gather_object(images), key=lambda image: (kinds.index(image.kind), image.index))


def places(rewards: Tensor, count: int) -> dict[Kind, list[int]]:
    """
    Select the best, median and worst samples; the best, the most central and the worst of all come first.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards; samples with NaN are left out.
        count (`int`):
            Number of samples of each kind; fewer if they would overlap, but at least one.
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
    """Combine an image with its rewards, one per function."""
    names = evaluator.scorer.names
    return LoggedImage(
        kind=kind,
        index=index,
        frames=record.frames(image),
        prompt=prompt,
        seed=seed,
        reward=record.valid(evaluator.scorer.total(rewards).item()),
        rewards={name: record.valid(reward) for name, reward in zip(names, rewards.tolist(), strict=True)},
    )


# ---- Trackers ----


def send(tracker: TrainerCallback, round: int, images: Sequence[LoggedImage], step: int) -> None:
    """Log images to the run that a tracker's callback has opened; other callbacks are ignored."""
    match tracker:
        case WandbCallback():
            import wandb

            log_table(wandb, round, images, step)
        case TrackioCallback():
            import trackio

            log_table(trackio, round, images, step)
        case TensorBoardCallback():
            writer = tracker.tb_writer
            for image in images:  # one name each, so that an image can be followed through the rounds
                writer.add_image(f"{SAMPLES}/{image.name}", np.asarray(image.still), step, dataformats="HWC")
            writer.add_text(SAMPLES, markdown(images), step)


def log_table(tracker: Any, round: int, images: Sequence[LoggedImage], step: int) -> None:
    """Log a table with a row per image to `wandb` or `trackio`, whose names are the same."""
    names = list(images[0].rewards)
    rows = [
        [
            round,
            image.name,
            tracker.Image(image.still, caption=image.prompt),
            image.prompt,
            image.reward,
            *(image.rewards[name] for name in names),
            str(image.seed),  # browsers would round the number
        ]
        for image in images
    ]
    columns = ["round", "name", "image", "prompt", "reward", *(f"rewards/{name}" for name in names), "seed"]
    tracker.log({SAMPLES: tracker.Table(columns=columns, data=rows), "train/global_step": step})


def markdown(images: Sequence[LoggedImage]) -> str:
    """Format prompts, rewards and seeds as a table."""
    lines = ["| image | prompt | reward | seed |", "|---|---|---|---|"]
    for image in images:
        reward = "" if image.reward is None else f"{image.reward:.4g}"
        prompt = " ".join(image.prompt.replace("|", "\\|").split())
        lines.append(f"| {image.name} | {prompt} | {reward} | {image.seed} |")
    return "\n".join(lines)
