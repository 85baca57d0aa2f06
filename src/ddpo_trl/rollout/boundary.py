"""End of a round, the only time at which a run is evaluated, saved and stopped: earlier requests wait for it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ddpo_trl.distributed import on_any_process


logger = logging.get_logger(__name__)

# Requests of callbacks that would interrupt a round, as messages name them.
REQUESTS = {
    "should_evaluate": "an evaluation",
    "should_save": "a checkpoint",
    "should_training_stop": "the end of training",
    "should_epoch_stop": "the end of the round",
}


class StopSignals:
    """
    Signals, by name, after which a run finishes its round, is saved and ends.

    Repeated signals change nothing: launchers send them again to each process after the cluster has.
    """

    def __init__(self, names: Sequence[str]):
        self.signals = [signal.Signals[name] for name in names]
        self.received = False
        self._process = os.getpid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals while the context is open, and restore the previous handlers afterwards."""
        self.received = False
        self._process = os.getpid()
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in self.signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked by a reward function: it ends as without this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received = True
            logger.warning(f"{signal.Signals(number).name} received: training stops at the end of this round.")


class RoundCallbacks(CallbackHandler):
    """
    Callback handler of the Trainer that postpones requests to the end of the round: a rollout is not part of a
    checkpoint.

    As the handler, it acts after all callbacks, including those that are added later.

    Attributes:
        inside (`bool`):
            Whether a round has begun and is not over.
        saved_at (`int`, *optional*):
            Optimizer step of the last checkpoint.
    """

    def __init__(self, handler: CallbackHandler, updates_per_round: int):
        super().__init__(
            handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        )
        self.updates_per_round = updates_per_round
        self.inside = False
        self.saved_at: int | None = None
        self._holding = False
        self._waiting: set[str] = set()

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Call all callbacks, and postpone what they request inside a round."""
        if event == "on_train_begin":  # requests that remain from a run that failed
            self.saved_at = None
            self._waiting.clear()
            vars(control).update(dict.fromkeys(REQUESTS, False))
        if event in ("on_train_begin", "on_epoch_begin"):
            self.inside = True
        control = super().call_event(event, args, state, control, **kwargs)
        if event == "on_save":
            self.saved_at = state.global_step
        if event == "on_epoch_end":
            self.inside = False
            self.release(control)
        elif self.inside or self._holding:
            is_last_step = event == "on_step_end" and state.global_step % self.updates_per_round == 0
            is_over = self._holding or is_last_step
            self._postpone(control, event, None if is_over else state.global_step // self.updates_per_round + 1)
        return control

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold requests, possibly of one process only, until all processes reach [`RoundCallbacks.release`]."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def release(self, control: TrainerControl) -> None:
        """Restore the requests that were postponed."""
        vars(control).update(dict.fromkeys(self._waiting, True))
        self._waiting.clear()

    def _postpone(self, control: TrainerControl, event: str, round: int | None) -> None:
        """Take requests back until the round is over; warn of new ones if a round is given."""
        asked = {name for name in REQUESTS if vars(control)[name]}
        vars(control).update(dict.fromkeys(asked, False))
        for name in sorted(asked - self._waiting):
            if round is not None:
                logger.warning(
                    f"A callback asked for {REQUESTS[name]} inside round {round} ({event}). It comes when the round "
                    "is over: a run can't be resumed from the middle of a round."
                )
        self._waiting |= asked


class RoundSchedule(TrainerCallback):
    """
    Reduce the evaluations of `eval_strategy="epoch"` and the checkpoints of `save_strategy="epoch"` to one every
    `eval_rounds` and `save_rounds`. [`end_round`] adds both for the last round.

    Trainer's own `"steps"` evaluates before the round is logged, so that a checkpoint saved as the best would lack its
    own round.
    """

    def __init__(self, eval_rounds: int, save_rounds: int, updates_per_round: int):
        self.eval_rounds = eval_rounds
        self.save_rounds = save_rounds
        self.updates_per_round = updates_per_round

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rounds = state.global_step // self.updates_per_round
        if args.eval_strategy == IntervalStrategy.EPOCH and rounds % self.eval_rounds:
            control.should_evaluate = False
        if args.save_strategy == SaveStrategy.EPOCH and rounds % self.save_rounds:
            control.should_save = False


def end_round(trainer: Trainer, rounds: RoundCallbacks, signals: StopSignals, act: Callable[[], None]) -> None:
    """
    Log, evaluate and save what was requested, on all processes alike, and let training continue or end.

    The last round of a run is evaluated and saved whichever callback ended it, and whenever it did so: while the round
    was logged, evaluated or saved. After a signal the round is saved and, since the run is going to be resumed,
    evaluated only if it is due. All processes have to call it.
    """
    evaluate, save = trainer.control.should_evaluate, trainer.control.should_save
    trainer.control.should_evaluate = trainer.control.should_save = False
    with rounds.holding():  # Trainer would save at once, on the only process whose callback asks for it
        act()  # the log comes first by itself: its callbacks may end the training
    rounds.release(trainer.control)
    trainer.control.should_evaluate |= evaluate
    trainer.control.should_save |= save
    evaluated = False
    while True:
        signalled = agree(trainer, signals)
        evaluate = trainer.control.should_evaluate and not evaluated
        save = trainer.control.should_save and (evaluate or rounds.saved_at != trainer.state.global_step)
        trainer.control.should_evaluate, trainer.control.should_save = evaluate, save
        if not (evaluate or save):
            break
        act()
        evaluated |= evaluate
    trainer.control.should_training_stop |= signalled
    if signalled and trainer.args.save_strategy == SaveStrategy.NO:
        logger.warning("The run ends here without a checkpoint, because save_strategy is 'no'.")


def agree(trainer: Trainer, signals: StopSignals) -> bool:
    """
    Share the requests of one process with all, and add those of the last round. Return whether a signal ends the run.
    All processes have to call it.
    """
    control, args = trainer.control, trainer.args
    evaluate, save, stop, signalled = on_any_process(
        trainer.accelerator,
        [control.should_evaluate, control.should_save, control.should_training_stop, signals.received],
    )
    if stop:
        evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= (trainer.state.epoch or 0)
        save |= args.save_strategy == SaveStrategy.EPOCH
    control.should_evaluate = evaluate
    control.should_save = save or (signalled and args.save_strategy != SaveStrategy.NO)
    control.should_training_stop = stop
    return signalled
