"""DDPOConfig: every setting of a run, as a `transformers.TrainingArguments`."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from transformers import TrainingArguments

from ddpo_trl.config_checks import check_given, check_relations
from ddpo_trl.descriptions import described
from ddpo_trl.settings import Bounds, Count, NotNegative, OptionalCount, Positive, default_of, documented, setting
from ddpo_trl.suggestions import checks_names


WindowStrategy = Literal["fixed", "progressive", "random"]
TransitionWeighting = Literal["uniform", "std"]

# Settings in which processes may differ: verbosity, trackers, identity.
OWN_SETTINGS = {
    "disable_tqdm", "hub_token", "local_rank", "log_level", "log_level_replica", "report_to", "run_name",
}  # fmt: skip

# Settings that Trainer derives where they are not given.
DERIVED_SETTINGS = {
    "accelerator_config", "dataloader_pin_memory", "debug", "disable_tqdm", "per_device_eval_batch_size", "report_to",
}  # fmt: skip


@documented(
    num_train_epochs="Parameters that control the length of the run",
    num_inference_steps="Parameters that control sampling",
    reward_weights="Parameters that control rewards and advantages",
    loss_type="Parameters that control the objective",
    num_ppo_epochs="Parameters that control the optimization",
    per_device_eval_batch_size="Parameters that control evaluation, logging and saving",
)
@dataclass
class DDPOConfig(TrainingArguments):
    """
    Configuration class for the [`DDPOTrainer`].

    This class lists only the arguments that are specific to DDPO or have another default here. For all other arguments
    see [`~transformers.TrainingArguments`]. One Trainer epoch is one *round*: sample, score, compute advantages,
    update.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """

    # ---- Length of the run ----

    num_train_epochs: float = setting(100, "Number of rounds.")
    total_episodes: OptionalCount = setting(
        None,
        """Number of reward queries (images scored) over all processes, instead of `num_train_epochs`. It is rounded up
        to whole rounds.""",
    )

    # ---- Sampling ----

    num_inference_steps: Count = setting(50, "Number of denoising steps per sample.")
    guidance_scale: float | None = setting(
        5.0,
        """Scale of classifier-free guidance, the same in sampling and in training. `None` for pipelines without this
        argument, or to use the pipeline's own default.""",
    )
    eta: float = setting(
        1.0,
        """Noise scale η of the DDIM family, > 0, in units of DDPM's noise. If it is too large for a step of the
        schedule, it is refused with the largest value that fits. Flow-matching pipelines do not use it.""",
    )
    noise_level: float = setting(
        0.7,
        """Noise scale `a` of the flow-matching SDE, > 0 (what `eta` is for DDIM). At most 1 for `sde_type="cps"`. For
        `"sde"` no step may add more noise than its state has; 0.7 always fits. The DDIM family does not use it.""",
    )
    sde_type: Literal["sde", "cps"] = setting(
        "sde",
        """How flow matching becomes stochastic: marginal-preserving as in
        [Flow-GRPO](https://huggingface.co/papers/2505.05470), or coefficient-preserving as in
        [Flow-CPS](https://huggingface.co/papers/2509.05952).""",
    )
    sde_window_size: OptionalCount = setting(
        None,
        """Number of consecutive steps that get noise and are trained on, as in
        [MixGRPO](https://huggingface.co/papers/2507.21802); the other steps are deterministic. The cost of training is
        proportional to it. `None` gives noise to all steps.""",
    )
    sde_window_strategy: WindowStrategy = setting(
        "fixed",
        """Position of the window in `train_timestep_range`: at its start, moving one step every `sde_window_interval`
        rounds (from the end back to the start), or drawn at random for each round.""",
    )
    sde_window_interval: Count = setting(25, "Number of rounds between two moves of a progressive window.")
    pipeline_kwargs: dict | str | None = setting(
        None,
        """Further arguments of the pipeline's `__call__` (`height`, `width`, `negative_prompt`, `num_frames`, ...),
        passed unchanged in sampling, training and evaluation. They may be images, tensors or functions; files and
        trackers then hold a description of them. A JSON string on the command line.""",
    )
    pipeline_inputs: list[str] | None = setting(
        None,
        """Names of arguments of the pipeline's `__call__` that differ between samples, such as `image` for
        image-to-image. They are taken from the metadata entries of these names.""",
    )
    offload_text_encoders: bool = setting(
        False,
        """Whether the text encoders stay in CPU memory and move to the GPU only to encode prompts: before the denoiser
        moves there for prompts known at construction, later once per round for new ones.""",
    )
    offload_vae: bool = setting(
        False, "Whether the autoencoder stays in CPU memory and moves to the GPU only to decode images."
    )
    vae_slicing: bool = setting(
        False, "Whether the autoencoder decodes one image at a time (`pipeline.vae.enable_slicing()`)."
    )
    vae_tiling: bool = setting(
        False,
        """Whether the autoencoder decodes large images in tiles (`pipeline.vae.enable_tiling()`). Overlaps are
        blended, so images differ slightly.""",
    )
    offload_rollout: bool = setting(
        False,
        """Whether the recorded steps of a round (its gradients, in one pass) are kept in CPU memory. Steps move to the
        GPU one micro-batch at a time.""",
    )
    per_device_sample_batch_size: Count = setting(4, "Number of images sampled at once per process.")
    num_sample_batches: Count = setting(8, "Number of batches sampled per round and process.")
    num_images_per_prompt: Count = setting(
        1,
        """Number of images per round that share a drawn prompt: the group of `advantage_normalization="group"`.""",
    )

    # ---- Rewards and advantages ----

    reward_weights: list[float] | None = setting(
        None, "Weight of each reward function in the sum. `None` gives each the weight 1."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = setting(
        "sum_then_normalize",
        """How several reward functions make one advantage, as in TRL's GRPO. `"sum_then_normalize"`: their weighted
        sum is standardized by `advantage_normalization`, so the function with the largest spread dominates.
        `"normalize_then_sum"` ([GDPO](https://huggingface.co/papers/2601.05242)): each is standardized by itself, then
        their weighted sum is standardized over the round.""",
    )
    try_reward_fn: bool = setting(
        False,
        """Whether every reward function scores an image (two, if batches have more than one) at construction, so that
        a faulty one is refused before anything is sampled. `False` calls none before training, because calls may be
        slow or paid; a problem with the first batch then ends the run before the second is sampled.""",
    )
    max_workers: Count = setting(2, "Number of threads that compute rewards while the next batch is sampled.")
    on_invalid_reward: Literal["raise", "drop"] = setting(
        "raise",
        """What happens to samples whose reward is NaN, infinite or `None`, and to all samples of a call that raises,
        exceeds `reward_timeout` or does not return one number per image. `"raise"` ends the run with an error.
        `"drop"` gives them the advantage 0, leaves them out of all statistics and logs their share as
        `rewards/invalid`; a share above one half is an error.""",
    )
    reward_timeout: Annotated[float | None, Bounds(above=0, finite=True)] = setting(
        None,
        """Maximum number of seconds per call of a reward function (one batch), including the first call. The thread of
        a longer call is abandoned; an `async` function is canceled. `None` sets no limit.""",
    )
    advantage_normalization: Literal["batch", "prompt", "group", "none"] = setting(
        "prompt",
        """What a reward is standardized against: the round (`"batch"`); the running statistics of its prompt and
        metadata (see `prompt_key_fn` of the trainer), which are those of the round until there are enough; its group,
        the `num_images_per_prompt` images of one draw of a prompt; or nothing.""",
    )
    advantage_clip: Positive = setting(
        5.0,
        """Maximum absolute advantage, in standard deviations. Not applied for `"none"`, which has no unit.""",
    )
    per_prompt_stat_tracking_buffer_size: Count = setting(
        16, 'Number of rewards remembered per prompt (`"prompt"` only).'
    )
    per_prompt_stat_tracking_min_count: Count = setting(
        16,
        """Number of rewards a prompt needs before its own mean and standard deviation are used. Until then those of
        the round are.""",
    )

    # ---- Objective ----

    loss_type: Literal["is", "sf"] = setting(
        "is", "Estimator of the policy gradient: importance sampling (PPO) or score function (REINFORCE)."
    )
    cliprange: Positive = setting(
        1e-4,
        """Clipping range ε of the importance ratio (`"is"` only). It belongs to `log_prob_reduction="mean"`, where the
        ratio is the D-th root of the true one: 1e-4 at D = 16384 latent dimensions is ±1.6 nats of the joint density.
        Rescale it with D.""",
    )
    log_prob_reduction: Literal["mean", "sum"] = setting(
        "mean", "Reduction of log-probabilities and KL over the latent dimensions."
    )
    kl_coef: NotNegative = setting(
        0.0,
        """Coefficient of the KL divergence to the pipeline without its adapter (with `use_lora=False`, to its initial
        weights) in the loss. Above 0 it costs one more forward pass per transition.""",
    )
    one_pass: bool | None = setting(
        None,
        """Whether per-sample gradients are taken while images are sampled and combined once the rewards are known,
        instead of replaying every step. The gradient is the same. `None` does so where it is exact and possible: one
        update per round, no KL, fp16 or sharding, linear layers and convolutions only, and enough memory on all
        processes; the batch plan names the reason if not. `True` makes that reason an error.""",
    )
    target_kl: Annotated[float | None, Bounds(above=0)] = setting(
        None,
        """Divergence from the sampling policy, ½·(log r)² averaged over an update (`policy/approxkl_avg`), above which
        the rest of the round's updates is skipped, that update included. Skipped updates change neither weights nor
        optimizer state, but count as steps; `policy/updates_skipped` logs their share. The first update of a round is
        always made. A useful size is `cliprange`²/2: 5e-9 for 1e-4. Only for `"is"` with several updates per round,
        without fp16 and DeepSpeed.""",
    )
    timestep_fraction: Annotated[float, Bounds(above=0, at_most=1)] = setting(
        1.0,
        "Share of the transitions in `train_timestep_range` that are trained on, drawn at random for each round.",
    )
    train_timestep_range: list[float] = setting(
        [0.0, 1.0],
        """Part of the trajectory, from noise (0) to image (1), whose transitions are trained on. With few steps the
        last ones have a tiny σ and dominate the gradient: `[0.0, 0.8]` leaves out the last two of ten.""",
    )
    transition_weighting: TransitionWeighting = setting(
        "uniform",
        """Weight of each transition in the objective. `"std"` is its σ, divided by the mean over the steps that may be
        trained on, as in [TempFlow-GRPO](https://huggingface.co/papers/2508.04324): late steps with a tiny σ count
        less, and none is left out.""",
    )

    # ---- Optimization ----

    num_ppo_epochs: Count = setting(1, 'Number of passes over a rollout. `"sf"` allows only one.')
    num_mini_batches: OptionalCount = setting(
        None,
        """Number of optimizer steps per pass. `None` is 4, or 2 or 1 if the samples of a round do not divide into 4
        mini-batches; with `one_pass=True` and for `"sf"`, which allows only one, it is 1.""",
    )
    per_device_train_batch_size: Count = setting(
        4,
        """Number of samples per micro-batch, all at one timestep; in one pass, the most that are sampled at once.
        Gradients accumulate over all trained timesteps of all samples of a mini-batch, so
        `gradient_accumulation_steps` is derived and must not be set.""",
    )
    use_lora: bool = setting(True, "Whether to train a LoRA adapter. `False` trains all weights of the denoiser.")
    adapter_compute_dtype: Literal["float32", "denoiser"] = setting(
        "float32", "Dtype of products with the adapter's float32 weights. That of the denoiser saves memory and time."
    )
    learning_rate: NotNegative = setting(3e-4, "Initial learning rate of AdamW.")
    weight_decay: NotNegative = setting(1e-4, "Weight decay of AdamW.")
    lr_scheduler_type: str = setting("constant", "Learning rate schedule.")

    # ---- Evaluation, logging and saving ----

    per_device_eval_batch_size: OptionalCount = setting(
        None,
        """Number of images made at once per process in an evaluation, `per_device_sample_batch_size` by default.""",
    )
    eval_rounds: Count = setting(
        1,
        """Number of rounds between evaluations with `eval_strategy="epoch"`. The last round is always evaluated. See
        [`~DDPOTrainer.evaluate`] for the figures and their cost.""",
    )
    metric_for_best_model: str | None = setting(
        None,
        """Evaluation figure used by `load_best_model_at_end`, `save_strategy="best"` and
        [`~transformers.EarlyStoppingCallback`]; `"eval_reward"` for the first two by default. Higher is better, unless
        `greater_is_better=False`.""",
    )
    log_images_rounds: Annotated[int, Bounds(at_least=0)] = setting(
        10,
        """Number of rounds between sets of sample images, in the trackers of `report_to` and in `output_dir`; also
        before the first round and after the last. A set costs `num_logged_images` images and their rewards, which are
        not counted in `episode`, and does not change the training samples. 0 makes no images.""",
    )
    num_logged_images: Count = setting(
        8,
        """Number of prompts per set of sample images, always with the same seeds and the pipeline's own scheduler: the
        first of `eval_prompts`, or else the first training prompts. Half as many of the best, median and worst samples
        of the round are added.""",
    )
    logging_nan_inf_filter: bool = setting(
        False,
        """Must stay `False`: a loss that is not finite ends the run before the weights change, and must not be
        hidden.""",
    )
    logging_strategy: str = setting(
        "epoch", 'When to log: `"epoch"` once per round, `"steps"` every `logging_steps` updates.'
    )
    save_strategy: str = setting("epoch", 'When to save a checkpoint: `"epoch"` (between rounds), `"best"` or `"no"`.')
    save_rounds: Count = setting(
        1,
        """Number of rounds between checkpoints with `save_strategy="epoch"`. The last round is always saved, and the
        best one with `load_best_model_at_end`.""",
    )
    save_total_limit: int | None = setting(
        3,
        """Maximum number of checkpoints: the last ones, and the best one if there is a `metric_for_best_model`. `None`
        keeps all.""",
    )
    stop_on_signal: list[str] = setting(
        ["SIGTERM"],
        """Signals after which [`~DDPOTrainer.train`] finishes the round, saves a checkpoint and returns, on all
        processes. Clusters send such a signal before they take a machine away; a script that trains with
        `resume_from_checkpoint=True` then continues when it is started again. `[]`, or `none` on the command line,
        leaves signals alone.""",
    )
    restore_callback_states_from_checkpoint: bool = setting(
        True,
        """Whether a resumed run restores the state of callbacks that have one, such as the patience of
        [`~transformers.EarlyStoppingCallback`].""",
    )
    resume_with_new_rewards: bool = setting(
        False,
        """Whether a run may be resumed with other reward functions than those of its checkpoint. The rewards
        remembered per prompt are forgotten then.""",
    )

    def __post_init__(self):
        if self.stop_on_signal in (None, ["none"], "none"):
            self.stop_on_signal = []
        elif isinstance(self.stop_on_signal, str):
            self.stop_on_signal = [self.stop_on_signal]
        if isinstance(self.pipeline_kwargs, str):
            self.pipeline_kwargs = parsed_json(self.pipeline_kwargs)
        check_given(self)  # before values are derived from others
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_sample_batch_size
        if self.num_mini_batches is None:
            self.num_mini_batches = self._default_mini_batches()
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "eval_reward"  # Trainer falls back to a loss, which evaluation does not have
        super().__post_init__()
        check_relations(self)

    def __repr__(self) -> str:
        """The settings that differ from their defaults."""
        given = {}
        for field in dataclasses.fields(self):
            value, default = vars(self)[field.name], default_of(field)
            if value != default and (value or default) and field.name not in DERIVED_SETTINGS:
                given[field.name] = value
        return f"DDPOConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def _default_mini_batches(self) -> int:
        """Return the most mini-batches, out of 4, 2 and 1, into which the samples of a round divide."""
        if self.loss_type == "sf" or self.one_pass:
            return 1
        samples = self.per_device_sample_batch_size * self.num_sample_batches
        return next(
            count for count in (4, 2, 1) if count == 1 or samples % (count * self.per_device_train_batch_size) == 0
        )

    def steps_in_range(self, steps: int) -> range:
        """Indices of the denoising steps in `train_timestep_range`, out of `steps`."""
        first, last = (round(bound * steps) for bound in self.train_timestep_range)
        return range(first, last)

    def to_dict(self) -> dict[str, Any]:
        """
        The settings in JSON's types, for files and trackers. Images, tensors, functions and the like in
        `pipeline_kwargs` become a description of them.
        """
        settings: dict[str, Any] = described(super().to_dict())
        return settings

    @property
    def updates_per_round(self) -> int:
        """Number of optimizer steps per round."""
        assert self.num_mini_batches is not None, "DDPOConfig sets it"
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def shared_settings(self) -> dict[str, Any]:
        """Settings that must be equal on all processes of a run."""
        return {name: value for name, value in self.to_dict().items() if name not in OWN_SETTINGS}


def parsed_json(text: str) -> Any:
    """
    The value of `pipeline_kwargs` on a command line.

    Raises:
        `ValueError`: If it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"pipeline_kwargs is {text!r}; give a dict, or on the command line a JSON object such as "
            f"'{{\"height\": 512}}' ({error})."
        ) from error


DDPOConfig.__init__ = checks_names("DDPOConfig")(DDPOConfig.__init__)  # type: ignore[method-assign]
