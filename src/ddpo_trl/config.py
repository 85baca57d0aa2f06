"""DDPOConfig: every setting of a run, as a `transformers.TrainingArguments`."""

import dataclasses
import json
import math
import signal
import warnings
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, Self, TypeVar

from accelerate.utils import get_int_from_env, parse_flag_from_env
from transformers import TrainingArguments

from ddpo_trl import trl_config
from ddpo_trl.descriptions import described
from ddpo_trl.suggestions import checks_names


T = TypeVar("T")


WindowStrategy = Literal["fixed", "progressive", "random"]
TransitionWeighting = Literal["uniform", "std"]


# Kinds of numbers by the type of a field, with their names.
NUMBERS: dict[Any, tuple[type, str]] = {
    int: (Integral, "an integer"),
    int | None: (Integral, "an integer"),
    float: (Real, "a number"),
    float | None: (Real, "a number"),
}

# Where launchers tell how many processes they started, as accelerate looks for it.
PROCESS_COUNTS = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]

# Settings that each process may have for itself: what it says and where, and who it is.
OWN_SETTINGS = {
    "disable_tqdm", "hub_token", "local_rank", "log_level", "log_level_replica", "report_to", "run_name",
}  # fmt: skip

# What the trainer hands to the pipeline's `__call__` itself, in sampling or in replay.
OWN_PIPELINE_ARGUMENTS = {
    "prompt", "num_inference_steps", "guidance_scale", "eta", "generator", "latents", "num_images_per_prompt",
    "output_type", "return_dict",
}  # fmt: skip

# Fields of TrainingArguments that would do nothing here, each with what to do instead. A value other than the default
# is refused, unless it is False: to switch off what is not there asks for nothing. `tests/test_config.py` says what
# becomes of all other fields.
WITHOUT_EFFECT = {
    "auto_find_batch_size": "the batch plan is made once, for all processes alike: set per_device_sample_batch_size "
    "and per_device_train_batch_size",
    "average_tokens_across_devices": "there are no tokens to count",
    "batch_eval_metrics": "an evaluation measures rewards: give eval_reward_fns",
    "bf16_full_eval": "images are made in the dtype of the pipeline: load it in bfloat16, or set bf16",
    "data_seed": "the order of prompts follows seed",
    "dataloader_drop_last": "there is no data loader: a round has per_device_sample_batch_size x num_sample_batches "
    "samples on each process",
    "dataloader_in_order": "there is no data loader",
    "dataloader_multiprocessing_context": "there is no data loader",
    "dataloader_num_workers": "there is no data loader: max_workers is the number of threads for rewards",
    "dataloader_persistent_workers": "there is no data loader",
    "dataloader_prefetch_factor": "there is no data loader",
    "eval_accumulation_steps": "images of an evaluation are kept in CPU memory anyway",
    "eval_do_concat_batches": "an evaluation has no predictions to join",
    "eval_use_gather_object": "an evaluation has no predictions to gather",
    "fp16_full_eval": "images are made in the dtype of the pipeline: load it in float16, or set fp16",
    "include_for_metrics": "an evaluation measures rewards: give eval_reward_fns",
    "include_num_input_tokens_seen": "there are no tokens to count: logs have episode, the reward queries so far",
    "label_names": "there are no labels",
    "label_smoothing_factor": "there are no labels",
    "length_column_name": "prompts are not grouped by length",
    "liger_kernel_config": "its kernels are of language models",
    "neftune_noise_alpha": "it is noise on a language model's embeddings: eta and noise_level are the noise here",
    "parallelism_config": "every process runs the whole pipeline: use FSDP2 or DeepSpeed by accelerate's config",
    "prediction_loss_only": "an evaluation has no loss",
    "torch_compile": "the pipeline calls the denoiser itself: compile its blocks before "
    "(`pipeline.transformer.compile_repeated_blocks()`)",
    "torch_compile_backend": "it belongs to torch_compile, which would do nothing",
    "torch_compile_mode": "it belongs to torch_compile, which would do nothing",
    "train_sampling_strategy": "a list of prompts is shuffled in every pass: give a prompt function for another order",
    "use_cache": "a denoiser has no cache of keys and values",
    "use_liger_kernel": "its kernels are of language models",
}


def suggests_names(config: type[T]) -> type[T]:
    """Class decorator: an unknown field is answered with what was probably meant."""

    def foreign(name: str) -> str:
        return f"It is TRL's: DDPOConfig.from_trl({name}=...) takes it." if name in trl_config.NAMES else ""

    config.__init__ = checks_names("DDPOConfig", foreign)(config.__init__)  # type: ignore[method-assign]
    return config


@suggests_names
@dataclass
class DDPOConfig(TrainingArguments):
    r"""
    Configuration class for the [`DDPOTrainer`].

    This class lists only what is specific to DDPO or has another default here. For all other arguments see
    [`~transformers.TrainingArguments`]. One Trainer epoch is one *round*: sample, score, advantages, optimise.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the length of the run

        num_train_epochs (`float`, *optional*, defaults to `100`):
            Rounds.
        total_episodes (`int`, *optional*):
            Reward queries (images scored) over all processes, in place of `num_train_epochs`; rounded up to whole
            rounds.

        > Parameters that control the sampler

        num_inference_steps (`int`, *optional*, defaults to `50`):
            Denoising steps of a sample.
        guidance_scale (`float`, *optional*, defaults to `5.0`):
            Classifier-free guidance, the same in sampling and in training. `None` for pipelines that take no such
            argument, and for the pipeline's own default.
        eta (`float`, *optional*, defaults to `1.0`):
            η of the DDIM family, > 0: how much noise a step adds, in units of DDPM's. A value that is too large for a
            step of the schedule is refused, with the largest that fits. Not used by flow matching.
        noise_level (`float`, *optional*, defaults to `0.7`):
            a of flow matching, > 0: how much noise a step adds, η's counterpart. At most 1 for `sde_type="cps"`; for
            `"sde"` no step may add more noise than its state has (0.7 always fits). Not used by the DDIM family.
        sde_type (`"sde"` or `"cps"`, *optional*, defaults to `"sde"`):
            How flow matching becomes stochastic: marginal-preserving as in
            [Flow-GRPO](https://huggingface.co/papers/2505.05470), or coefficient-preserving as in
            [Flow-CPS](https://huggingface.co/papers/2509.05952).
        sde_window_size (`int`, *optional*):
            Noise in, and training on, this many steps in a row only, as in
            [MixGRPO](https://huggingface.co/papers/2507.21802); the others are deterministic. The cost of training
            falls with it. `None` gives noise to all steps.
        sde_window_strategy (`"fixed"`, `"progressive"` or `"random"`, *optional*, defaults to `"fixed"`):
            Where in `train_timestep_range` the window is: at its start; moving on by a step every
            `sde_window_interval` rounds, from the end back to the start; or drawn anew in each round.
        sde_window_interval (`int`, *optional*, defaults to `25`):
            Rounds between two moves of a progressive window.
        pipeline_kwargs (`dict` or `str`, *optional*):
            Further arguments of the pipeline's `__call__` (`height`, `width`, `negative_prompt`, `num_frames`, ...),
            handed over unchanged in sampling, in training and in evaluation. They may be images, tensors or functions;
            files and trackers then have a description of them. A JSON string on the command line.
        pipeline_inputs (`list[str]`, *optional*):
            Arguments of the pipeline's `__call__` that differ between samples, such as `image` for image-to-image:
            metadata entries of these names are handed over as lists.
        offload_text_encoders (`bool`, *optional*, defaults to `False`):
            Whether the text encoders stay in CPU memory and go to the GPU only while there are prompts to encode:
            before the denoiser does for those that are known by then, later once a round for those that are new.
        offload_vae (`bool`, *optional*, defaults to `False`):
            Whether the autoencoder stays in CPU memory and goes to the GPU only while images are made.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether the autoencoder decodes one image at a time, as `pipeline.vae.enable_slicing()` makes it do.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether it decodes tiles of large images, as `pipeline.vae.enable_tiling()` makes it do. Overlaps are
            blended, so that images differ a little.
        offload_rollout (`bool`, *optional*, defaults to `False`):
            Whether the recorded steps of a round, or in one pass its gradients, wait in CPU memory; steps go to the
            GPU one micro-batch at a time.
        per_device_sample_batch_size (`int`, *optional*, defaults to `4`):
            Images sampled at once on one process.
        num_sample_batches (`int`, *optional*, defaults to `8`):
            Batches sampled in a round on each process.
        num_images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of a round that share a drawn prompt: the group of `advantage_normalization="group"`.

        > Parameters that control the rewards and advantages

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in the sum. `None` weighs all by 1.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How several reward functions make one advantage. `"sum_then_normalize"`: their weighted sum is standardised
            as `advantage_normalization` says, and the function with the largest spread decides. `"normalize_then_sum"`
            ([GDPO](https://huggingface.co/papers/2601.05242)): each is standardised by itself, whatever its scale;
            then their weighted sum, over the round. As in TRL's GRPO.
        max_workers (`int`, *optional*, defaults to `2`):
            Threads that compute rewards while the next batch is sampled.
        on_invalid_reward (`"raise"` or `"drop"`, *optional*, defaults to `"raise"`):
            What happens to a sample whose reward is NaN, infinite or `None`, and to all samples of a call that raises,
            takes longer than `reward_timeout` or returns no list of one number per image. `"raise"` ends the run with
            an error. `"drop"` goes on: their advantage is 0, no statistic counts them, and `rewards/invalid` logs
            their share of the round; if it is more than half, that is an error too.
        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function may take for one batch, the first one included. The thread of a
            call that takes longer is left behind; an `async` function is cancelled. `None` sets no limit.
        advantage_normalization (`"batch"`, `"prompt"`, `"group"` or `"none"`, *optional*, defaults to `"batch"`):
            What a reward is standardised against: the round; the running statistics of its prompt and metadata (of
            what `prompt_key_fn` of the trainer makes of them); its group, the `num_images_per_prompt` images of one
            draw of a prompt; or nothing.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clipped to ± this many standard deviations. Not applied to `"none"`, which has no unit.
        per_prompt_stat_tracking_buffer_size (`int`, *optional*, defaults to `16`):
            Rewards remembered of each prompt (`"prompt"` only).
        per_prompt_stat_tracking_min_count (`int`, *optional*, defaults to `16`):
            Remembered rewards from which on a prompt's own statistics are used instead of the round's.

        > Parameters that control the objective

        loss_type (`"is"` or `"sf"`, *optional*, defaults to `"is"`):
            Importance sampling (PPO) or score function (REINFORCE).
        cliprange (`float`, *optional*, defaults to `1e-4`):
            ε of the ratio (`"is"` only). It belongs to `log_prob_reduction="mean"`: the ratio then is the D-th root of
            the true one, and 1e-4 at D = 16384 latent dimensions is ±1.6 nats of the joint density. Rescale it with D.
        log_prob_reduction (`"mean"` or `"sum"`, *optional*, defaults to `"mean"`):
            How log-probabilities and KL are reduced over the latent dimensions.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence to the pipeline without its adapter (or, with `use_lora=False`, as it was at
            the start), in the loss. Above 0 it costs one more forward pass per transition.
        one_pass (`bool`, *optional*):
            Whether gradients are taken while images are sampled, one for each sample, for the rewards to weigh
            afterwards: no step is run a second time, and no trajectory is kept, but a gradient for each sample of the
            round. It is the same gradient. `None` does so where it is exact and possible: with one update per round
            (`"sf"`, or `"is"` whose ratios then are 1), without KL, checkpointing, fp16 or sharding, on linear layers
            and convolutions, where memory is enough on all processes; the batch plan at the start says why not.
            `True` makes that an error.
        target_kl (`float`, *optional*):
            Ends a round's updates at the first one that finds the policy farther than this from the one that sampled
            the round: by `policy/approxkl_avg`, ½·(log r)², averaged over the update's micro-batches and over
            processes. That update and the rest of the round are left out, with their forward passes; weights and
            optimizer stay as they are, steps and learning rate count on, and `loss` counts them as 0. The first update
            of a round is always made. `policy/updates_skipped` logs their share. Of the size of `cliprange`²/2, where
            a typical ratio reaches the edge of the trusted interval: 5e-9 for 1e-4. `"is"` with several updates per
            round only; not with fp16 or DeepSpeed.
        timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the transitions in `train_timestep_range` that are trained on, drawn anew in each round.
        train_timestep_range (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Part of the trajectory, from noise (0) to image (1), whose transitions are trained on. The last ones have a
            tiny σ and outweigh the rest when there are few steps: `[0.0, 0.8]` leaves out the last two of ten.
        transition_weighting (`"uniform"` or `"std"`, *optional*, defaults to `"uniform"`):
            Weight of each transition in the objective. `"std"` is its σ, divided by the mean over the steps that may
            be trained on: where there is little to explore there is little to learn, as in
            [TempFlow-GRPO](https://huggingface.co/papers/2508.04324). It takes from late steps the weight that a tiny
            σ gives their gradient, and leaves none of them out.

        > Parameters that control the optimisation

        num_ppo_epochs (`int`, *optional*, defaults to `1`):
            Passes over a rollout. `"sf"` allows one only.
        num_mini_batches (`int`, *optional*, defaults to `1`):
            Optimizer steps in each pass. `"sf"` allows one only.
        per_device_train_batch_size (`int`, *optional*, defaults to `4`):
            Samples of a micro-batch, all at one timestep. Gradients accumulate over all trained timesteps of all
            samples of a mini-batch, so `gradient_accumulation_steps` is derived and must not be set.
        use_lora (`bool`, *optional*, defaults to `True`):
            Whether to train a LoRA adapter. `False` trains the denoiser's own weights.
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Initial learning rate of AdamW.
        weight_decay (`float`, *optional*, defaults to `1e-4`):
            Weight decay of AdamW.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule.

        > Parameters that control evaluation, logging and saving

        per_device_eval_batch_size (`int`, *optional*):
            Images of an evaluation made at once on one process; `per_device_sample_batch_size` by default.
        eval_rounds (`int`, *optional*, defaults to `1`):
            Rounds from one evaluation to the next with `eval_strategy="epoch"`; the last round is evaluated in any
            case. See [`~DDPOTrainer.evaluate`] for what is measured and what it costs.
        metric_for_best_model (`str`, *optional*):
            Figure of the evaluation that `load_best_model_at_end`, `save_strategy="best"` and
            [`~transformers.EarlyStoppingCallback`] go by; `"eval_reward"` for the first two if it is not set. The
            higher the better, unless `greater_is_better=False`.
        log_images_rounds (`int`, *optional*, defaults to `10`):
            Rounds from one set of sample images to the next, in the trackers of `report_to` and in `output_dir`. There
            is one before the first round and one after the last, too. Each costs `num_logged_images` images and their
            rewards, which are no part of `episode`, and draws no random number that training would draw. 0 makes no
            pictures at all.
        num_logged_images (`int`, *optional*, defaults to `8`):
            Prompts whose images are logged every time, with the same seeds and the pipeline's own scheduler: the first
            of `eval_prompts`, or those that training begins with. With them go half as many each of the best, the
            median and the worst samples of the round.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            Not used by this trainer and must stay `False`: a loss that is not finite ends the run before the weights
            change, and no filter may hide it.
        logging_strategy (`str`, *optional*, defaults to `"epoch"`):
            When to log: `"epoch"` is once a round, `"steps"` every `logging_steps` updates.
        save_strategy (`str`, *optional*, defaults to `"epoch"`):
            When to save a checkpoint: `"epoch"` (between rounds), `"best"` or `"no"`.
        save_rounds (`int`, *optional*, defaults to `1`):
            Rounds from one checkpoint to the next with `save_strategy="epoch"`. The last round is saved in any case,
            whatever ended the run, and so is the best one with `load_best_model_at_end`.
        save_total_limit (`int`, *optional*, defaults to `3`):
            Checkpoints that are kept: the last ones and, if there is a `metric_for_best_model`, the best. `None` keeps
            all.
        stop_on_signal (`list[str]`, *optional*, defaults to `["SIGTERM"]`):
            Signals after which [`~DDPOTrainer.train`] finishes the round, saves a checkpoint and returns, on all
            processes: what a cluster sends before it takes the machine away. A script that trains with
            `resume_from_checkpoint=True` goes on when it is started again. `[]`, or `none` on the command line, leaves
            signals alone.
        restore_callback_states_from_checkpoint (`bool`, *optional*, defaults to `True`):
            Whether a resumed run goes on with the state of callbacks that have one, such as the patience of
            [`~transformers.EarlyStoppingCallback`].
        resume_with_new_rewards (`bool`, *optional*, defaults to `False`):
            Whether a run may be resumed with other reward functions than those of its checkpoint. Rewards remembered
            of each prompt are forgotten then.
    """

    # Parameters whose default value differs from TrainingArguments; optimizer values as in TRL 0.23's DDPOConfig
    num_train_epochs: float = field(default=100, metadata={"help": "Rounds of sampling and optimising."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Samples of a micro-batch, all at one timestep."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: 'epoch' (between rounds), 'best' or 'no'."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay False: a loss that is not finite ends the run."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether a resumed run goes on with the state of callbacks that have one."}
    )
    save_total_limit: int | None = field(default=3, metadata={"help": "Checkpoints that are kept."})
    logging_strategy: str = field(
        default="epoch",
        metadata={"help": "When to log: 'epoch' is once a round, 'steps' every `logging_steps` updates."},
    )

    # Parameters that control the length of the run
    total_episodes: int | None = field(
        default=None, metadata={"help": "Reward queries in all, in place of `num_train_epochs`."}
    )

    # Parameters that control the sampler
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps of a sample."})
    guidance_scale: float | None = field(
        default=5.0, metadata={"help": "Classifier-free guidance, the same in sampling and in training."}
    )
    eta: float = field(
        default=1.0, metadata={"help": "Noise of a DDIM step in units of DDPM's, > 0: the policy's exploration."}
    )
    noise_level: float = field(
        default=0.7, metadata={"help": "Noise of a flow matching step, > 0: what eta is to the DDIM family."}
    )
    sde_type: Literal["sde", "cps"] = field(
        default="sde", metadata={"help": "Flow matching's noise: marginal- or coefficient-preserving."}
    )
    sde_window_size: int | None = field(
        default=None, metadata={"help": "Noise in, and training on, this many steps in a row only."}
    )
    sde_window_strategy: Literal["fixed", "progressive", "random"] = field(
        default="fixed", metadata={"help": "Where the window is: at the start, moving on, or drawn in each round."}
    )
    sde_window_interval: int = field(
        default=25, metadata={"help": "Rounds between two moves of a progressive window."}
    )
    pipeline_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's `__call__`, as JSON."}
    )
    pipeline_inputs: list[str] | None = field(
        default=None, metadata={"help": "Metadata entries that are handed to the pipeline per sample."}
    )
    offload_text_encoders: bool = field(
        default=False, metadata={"help": "Keep the text encoders off the GPU while nothing is encoded."}
    )
    offload_vae: bool = field(
        default=False, metadata={"help": "Keep the autoencoder off the GPU while no images are made."}
    )
    vae_slicing: bool = field(default=False, metadata={"help": "Decode one image at a time."})
    vae_tiling: bool = field(default=False, metadata={"help": "Decode large images in tiles."})
    offload_rollout: bool = field(default=False, metadata={"help": "Keep the recorded steps of a round off the GPU."})
    per_device_sample_batch_size: int = field(default=4, metadata={"help": "Images sampled at once on one process."})
    num_sample_batches: int = field(default=8, metadata={"help": "Batches sampled in a round on each process."})
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images of a round that share a drawn prompt."})

    # Parameters that control the rewards and advantages
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function in the sum, 1 by default."}
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = field(
        default="sum_then_normalize", metadata={"help": "Whether each reward is standardised before they are summed."}
    )
    max_workers: int = field(
        default=2, metadata={"help": "Threads that compute rewards while the next batch is sampled."}
    )
    on_invalid_reward: Literal["raise", "drop"] = field(
        default="raise", metadata={"help": "Whether a reward that is missing or not finite ends the run."}
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward function may take for one batch."}
    )
    advantage_normalization: Literal["batch", "prompt", "group", "none"] = field(
        default="batch", metadata={"help": "What a reward is standardised against."}
    )
    advantage_clip: float = field(
        default=5.0, metadata={"help": "Advantages are clipped to ± this many standard deviations."}
    )
    per_prompt_stat_tracking_buffer_size: int = field(
        default=16, metadata={"help": "Rewards remembered of each prompt."}
    )
    per_prompt_stat_tracking_min_count: int = field(
        default=16, metadata={"help": "Remembered rewards from which on a prompt's own statistics are used."}
    )

    # Parameters that control the objective
    loss_type: Literal["is", "sf"] = field(
        default="is", metadata={"help": "Importance sampling (PPO) or score function (REINFORCE)."}
    )
    cliprange: float = field(
        default=1e-4, metadata={"help": "Half-width of the trusted interval of the ratio. Belongs to the mean over D."}
    )
    log_prob_reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "How log-probabilities and KL are reduced over the latent dimensions."}
    )
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the KL to the pipeline without its adapter."})
    one_pass: bool | None = field(
        default=None,
        metadata={"help": "Take gradients while sampling, and run no step again. Wherever that is exact, by default."},
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Ends a round's updates once `policy/approxkl_avg` exceeds it."}
    )
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the transitions that are trained on, drawn anew in each round."}
    )
    train_timestep_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Part of the trajectory, from noise (0) to image (1), whose transitions are trained on."},
    )
    transition_weighting: Literal["uniform", "std"] = field(
        default="uniform", metadata={"help": "Whether all transitions weigh alike in the objective, or by their σ."}
    )

    # Parameters that control the optimisation
    num_ppo_epochs: int = field(default=1, metadata={"help": "Passes over a rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in each pass over a rollout."})
    use_lora: bool = field(
        default=True, metadata={"help": "Train a LoRA adapter, or else the denoiser's own weights."}
    )

    # Parameters that control evaluation and logging
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Images of an evaluation made at once, as in sampling by default."}
    )
    eval_rounds: int = field(
        default=1, metadata={"help": "Rounds from one evaluation to the next with eval_strategy='epoch'."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Figure of the evaluation that decides which checkpoint is the best."}
    )
    log_images_rounds: int = field(
        default=10, metadata={"help": "Rounds from one set of logged images to the next; 0 makes no pictures."}
    )
    num_logged_images: int = field(
        default=8, metadata={"help": "Prompts whose images are logged every time, with the same seeds."}
    )
    save_rounds: int = field(
        default=1, metadata={"help": "Rounds from one checkpoint to the next with save_strategy='epoch'."}
    )
    stop_on_signal: list[str] = field(
        default_factory=lambda: ["SIGTERM"],
        metadata={"help": "Signals after which the round is finished and saved, and training ends."},
    )
    resume_with_new_rewards: bool = field(
        default=False, metadata={"help": "Resume with other reward functions than the checkpoint's."}
    )

    def __post_init__(self):
        self._check_types()
        self._check_without_effect()  # before values are derived from others
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_sample_batch_size
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "eval_reward"  # Trainer falls back to a loss, which evaluation does not have
        super().__post_init__()
        self._check_processes()
        self._check_positive()
        self._check_finite()
        self._check_trainer_options()
        self._check_noise()
        self._check_ranges()
        self._check_objective()
        self._check_target_kl()
        self._check_one_pass()
        self._check_pipeline_kwargs()
        self._check_round_boundaries()
        self._check_signals()

    @classmethod
    def from_trl(cls, **old: Any) -> Self:
        """
        The config that does what TRL 0.23's `DDPOConfig(**old)` did.

        TRL's names have TRL's meanings, and TRL's defaults where they are left out: among them fp16, one image at a
        time and seed 0. `docs/migration.md` has all of them. A name for which there is nothing here gives a warning.

        Args:
            old:
                Fields of TRL's config, and of ours that TRL's did not have (`output_dir`, `use_lora`, ...). The latter
                win where they mean the same.

        Raises:
            `ValueError`: For names that are neither, and for values that TRL refused as well.

        Example:

        ```python
        from ddpo_trl import DDPOConfig

        config = DDPOConfig.from_trl(
            sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3, mixed_precision="no"
        )
        assert config.num_mini_batches == 8  # 24 images a round, an optimizer step for every 3
        ```
        """
        trl_config.check_names(old, [field.name for field in dataclasses.fields(cls)])
        theirs = {name: value for name, value in old.items() if name in trl_config.NAMES}
        ours = {name: value for name, value in old.items() if name not in trl_config.NAMES}
        for name, remedy in trl_config.without_counterpart(theirs):
            warnings.warn(f"TRL's {name} has no counterpart: {remedy}.", stacklevel=2)
        return cls(**{**trl_config.converted(trl_config.TRLConfig(**theirs)), **ours})

    def to_dict(self) -> dict[str, Any]:
        """
        The settings in JSON's types, for files and trackers. Images, tensors, functions and the like in
        `pipeline_kwargs` become a description of them.
        """
        settings: dict[str, Any] = described(super().to_dict())
        return settings

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps of a round."""
        return self.num_ppo_epochs * self.num_mini_batches

    def _check_without_effect(self) -> None:
        """Refuses what would do nothing: a run does what was asked, or says that it does not."""
        defaults = {field.name: field for field in dataclasses.fields(TrainingArguments)}
        for name, remedy in WITHOUT_EFFECT.items():
            default, value = defaults[name], vars(self)[name]
            usual = default.default if default.default_factory is dataclasses.MISSING else default.default_factory()
            if value != usual and value is not None and value is not False:
                raise ValueError(f"{name} is {value!r}, which would do nothing here: {remedy}. Leave it out.")
        for what, remedy in (
            ("logging", "set logging_strategy='steps'"),
            ("eval", "a run is evaluated between rounds: set eval_rounds"),
            ("save", "a run is saved between rounds: set save_rounds"),
        ):
            steps, strategy = vars(self)[f"{what}_steps"], vars(self)[f"{what}_strategy"]
            if steps != defaults[f"{what}_steps"].default and strategy != "steps":
                raise ValueError(
                    f"{what}_steps is {steps}, which does nothing with {what}_strategy={str(strategy)!r}: {remedy}, "
                    "or leave it out."
                )

    def _check_types(self) -> None:
        """Refuses texts for numbers, and single values for several: a string would be taken for its letters."""
        for field_ in dataclasses.fields(self):
            kind, what = NUMBERS.get(field_.type, (object, ""))
            value = vars(self)[field_.name]
            if not isinstance(value, kind | None) or (what and isinstance(value, bool)):
                hint = " (In YAML, 1e-4 is a text and 1.0e-4 a number.)" if isinstance(value, str) else ""
                raise TypeError(f"{field_.name} is {value!r}; give {what}.{hint}")
        for name in ("pipeline_inputs", "reward_weights", "train_timestep_range"):
            value = vars(self)[name]
            if value is not None and not isinstance(value, list | tuple):
                raise TypeError(f"{name} is {value!r}; give a list, such as {[value]!r}.")
        if isinstance(self.pipeline_kwargs, str):
            try:
                self.pipeline_kwargs = json.loads(self.pipeline_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"pipeline_kwargs is {self.pipeline_kwargs!r}; give a dict, or on the command line a JSON object "
                    f'such as \'{{"height": 512, "width": 512}}\' ({error}).'
                ) from error

    def _check_positive(self) -> None:
        for name in (
            "num_inference_steps", "per_device_sample_batch_size", "num_sample_batches", "num_images_per_prompt",
            "per_device_train_batch_size", "num_ppo_epochs", "num_mini_batches", "max_workers",
            "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count", "sde_window_interval",
            "eval_rounds", "num_logged_images", "save_rounds", "per_device_eval_batch_size",
        ):  # fmt: skip
            if (value := vars(self)[name]) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name in ("advantage_clip", "cliprange"):
            if not (value := vars(self)[name]) > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        if self.log_images_rounds < 0:
            raise ValueError(f"log_images_rounds is {self.log_images_rounds}; it must be 0 (no pictures) or above.")
        for name in ("total_episodes", "sde_window_size"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or None.")
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise ValueError(
                f"reward_timeout is {self.reward_timeout}; it must be a number of seconds above 0, or None for no "
                "limit."
            )

    def _check_finite(self) -> None:
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be a finite number, or None.")
        for name in (
            "learning_rate", "weight_decay", "kl_coef", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps",
            "eval_delay",
        ):  # fmt: skip
            if (value := vars(self)[name]) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number, 0 or above.")
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it must be above 0, or 0 for no clipping.")

    def _check_noise(self) -> None:
        if not self.eta > 0:
            raise ValueError(
                f"eta is {self.eta}: a step without noise is no policy. Set eta above 0 (1.0 is DDPM's noise)."
            )
        if not self.noise_level > 0:
            raise ValueError(
                f"noise_level is {self.noise_level}: a step without noise is no policy. Set noise_level above 0."
            )
        if self.sde_type == "cps" and self.noise_level > 1:
            raise ValueError(
                f"noise_level is {self.noise_level} with sde_type='cps', where 1.0 already replaces all noise. Set it "
                "to 1.0 or below."
            )

    def _check_ranges(self) -> None:
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction is {self.timestep_fraction}; it must be in (0, 1].")
        bounds = self.train_timestep_range
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
            raise ValueError(
                f"train_timestep_range is {bounds}; it must be two numbers with 0 <= first < second <= 1, such as "
                "[0.0, 0.8] for the first 80 % of the steps."
            )
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count is {self.per_prompt_stat_tracking_min_count}, more than the "
                f"{self.per_prompt_stat_tracking_buffer_size} rewards that are remembered: no prompt's own statistics "
                "would ever be used. Raise per_prompt_stat_tracking_buffer_size or lower the count."
            )

    def _check_trainer_options(self) -> None:
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter is True, which would hide a loss that is not finite. Leave it at False, "
                "so that such a loss ends the run."
            )

    def _check_objective(self) -> None:
        choices = {
            "loss_type": ("is", "sf"),
            "on_invalid_reward": ("raise", "drop"),
            "advantage_normalization": ("batch", "prompt", "group", "none"),
            "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
            "log_prob_reduction": ("mean", "sum"),
            "sde_type": ("sde", "cps"),
            "sde_window_strategy": ("fixed", "progressive", "random"),
            "transition_weighting": ("uniform", "std"),
        }
        for name, allowed in choices.items():
            if (value := vars(self)[name]) not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}.")
        if self.loss_type == "sf" and self.updates_per_round > 1:
            raise ValueError(
                f"loss_type is 'sf' with num_ppo_epochs={self.num_ppo_epochs} and num_mini_batches="
                f"{self.num_mini_batches}: after the first update the samples no longer come from the current policy, "
                "and the score-function gradient is biased. Set both to 1, or loss_type='is'."
            )
        if self.advantage_normalization == "group" and self.num_images_per_prompt < 2:
            raise ValueError(
                "advantage_normalization is 'group' with num_images_per_prompt=1: a group of one image has no "
                "advantage. Set num_images_per_prompt to 2 or more."
            )

        if self.multi_objective_aggregation == "normalize_then_sum" and self.advantage_normalization == "none":
            raise ValueError(
                "multi_objective_aggregation is 'normalize_then_sum', but advantage_normalization='none' says that "
                "nothing is to be normalised. Set it to 'batch', 'prompt' or 'group'."
            )

    @property
    def shared_settings(self) -> dict[str, Any]:
        """Those that all processes of a run have to have alike."""
        return {name: value for name, value in self.to_dict().items() if name not in OWN_SETTINGS}

    @property
    def reason_for_two_passes(self) -> str | None:
        """
        Why these settings need every step run again in training; `None` if they don't.

        One pass is exact where the whole gradient of a round is taken by the policy that sampled it.
        """
        sample_size, train_size = self.per_device_sample_batch_size, self.per_device_train_batch_size
        reasons = {
            f"a round has {self.updates_per_round} updates": self.updates_per_round > 1,
            f"kl_coef is {self.kl_coef:g}": self.kl_coef > 0,
            f"timestep_fraction is {self.timestep_fraction:g}": self.timestep_fraction < 1,
            "gradient_checkpointing is on": self.gradient_checkpointing,
            "fp16 scales the loss": self.fp16,
            "the weights are sharded": bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
            "DeepSpeed takes the gradients": self.deepspeed_plugin is not None,
            f"per_device_sample_batch_size ({sample_size}) is above per_device_train_batch_size ({train_size}), the "
            "samples that a backward pass may hold": sample_size > train_size,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def _check_processes(self) -> None:
        started = get_int_from_env(PROCESS_COUNTS, 1)
        if started > 1 and self.world_size == 1:
            raise ValueError(
                f"{started} processes were started, but they found no accelerator each over which to join: every one "
                "would train a run of its own. Set use_cpu=True for one run on their CPUs, or start a single process."
            )

    def _check_one_pass(self) -> None:
        if self.one_pass and (reason := self.reason_for_two_passes):
            raise ValueError(f"one_pass is True, but {reason}. Change that, or leave one_pass out to take two passes.")

    def _check_target_kl(self) -> None:
        if self.target_kl is None:
            return
        if not self.target_kl > 0:
            raise ValueError(f"target_kl is {self.target_kl}; it must be above 0, or None for no limit.")
        if self.loss_type == "sf":
            raise ValueError(
                "target_kl is set with loss_type='sf', whose one update per round starts from the policy that "
                "sampled: there is no divergence to limit. Leave it out, or set loss_type='is'."
            )
        if self.updates_per_round == 1:
            raise ValueError(
                "target_kl is set with one update per round, which is always made: it could do nothing. Raise "
                "num_ppo_epochs or num_mini_batches, or leave it out."
            )
        if self.fp16 or self.deepspeed_plugin is not None:
            what = "the loss scaler of fp16 counts" if self.fp16 else "DeepSpeed makes"
            raise ValueError(
                f"target_kl is set, but {what} the optimizer step before it is known whether the update is left out. "
                "Use bf16 or float32, with DDP or FSDP; or leave target_kl out."
            )

    def _check_pipeline_kwargs(self) -> None:
        pipeline_inputs = set(self.pipeline_inputs or ())
        if taken := OWN_PIPELINE_ARGUMENTS & pipeline_inputs:
            raise ValueError(
                f"pipeline_inputs holds {', '.join(sorted(taken))}, which the trainer sets itself. Leave it out."
            )
        if self.pipeline_kwargs is None:
            return
        if not isinstance(self.pipeline_kwargs, dict):
            raise ValueError(
                f"pipeline_kwargs is {self.pipeline_kwargs!r}; give a dict, or on the command line a JSON object such "
                'as \'{"height": 512, "width": 512}\'.'
            )
        if taken := OWN_PIPELINE_ARGUMENTS & self.pipeline_kwargs.keys():
            raise ValueError(
                f"pipeline_kwargs holds {', '.join(sorted(taken))}, which the trainer sets itself. Use the config's "
                "field of that name where there is one."
            )
        if both := pipeline_inputs & self.pipeline_kwargs.keys():
            raise ValueError(
                f"{', '.join(sorted(both))} is in pipeline_kwargs and in pipeline_inputs; it is either the same for "
                "all samples or comes from their metadata. Leave it out of one."
            )

    def _check_signals(self) -> None:
        if isinstance(self.stop_on_signal, str):
            self.stop_on_signal = [self.stop_on_signal]
        if self.stop_on_signal in (None, ["none"]):
            self.stop_on_signal = []
        for name in self.stop_on_signal:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(
                    f"stop_on_signal holds {name!r}, which is no signal that can be waited for. Give names such as "
                    "'SIGTERM' or 'SIGUSR1'."
                )

    def _check_round_boundaries(self) -> None:
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but it is derived: gradients "
                "accumulate over all trained timesteps of all samples of a mini-batch. Leave it at 1 and choose "
                "per_device_train_batch_size (memory) and num_mini_batches (optimizer steps) instead."
            )
        if self.save_strategy == "steps":
            raise ValueError(
                "save_strategy is 'steps': a checkpoint inside a round can't be resumed, because the rollout is not "
                "part of it. Set save_strategy='epoch' (one epoch is one round), 'best' or 'no'."
            )
        if self.save_strategy == "best" and self.eval_strategy != "epoch":
            raise ValueError(
                f"save_strategy is 'best' with eval_strategy={str(self.eval_strategy)!r}: the best checkpoint must "
                "fall between rounds. Set eval_strategy='epoch'."
            )
        if self.eval_strategy == "steps":
            raise ValueError(
                "eval_strategy is 'steps', but a run is evaluated, saved and stopped between rounds only. Set "
                "eval_strategy='epoch', and eval_rounds if not every round is to be evaluated."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint is True: it would save inside a round, and such a checkpoint can't be resumed. "
                "Leave it out: after a SIGTERM the round is finished and saved as it is (stop_on_signal)."
            )
        for name, strategy in (("eval_rounds", "eval_strategy"), ("save_rounds", "save_strategy")):
            if (value := vars(self)[name]) > 1 and vars(self)[strategy] != "epoch":
                raise ValueError(
                    f"{name} is {value}, but {strategy} is not 'epoch': it would do nothing. Set {strategy}='epoch', "
                    f"or leave {name} out."
                )
        if self.max_steps > 0 and self.max_steps % self.updates_per_round:
            raise ValueError(
                f"max_steps is {self.max_steps}, which ends inside a round of {self.updates_per_round} optimizer "
                "steps (num_ppo_epochs x num_mini_batches). Set a multiple, or use num_train_epochs or total_episodes."
            )
        if not math.isfinite(self.num_train_epochs) or self.num_train_epochs % 1:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; a run has a whole number of rounds.")
