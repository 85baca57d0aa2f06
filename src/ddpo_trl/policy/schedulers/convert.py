"""Conversion of a pipeline's scheduler to the policy scheduler of the same diffusion."""

import copy
from typing import Any

import diffusers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ddpo_trl.policy.schedulers.base import PolicyScheduler, policy_class
from ddpo_trl.policy.schedulers.ddim import DDIMPolicyScheduler
from ddpo_trl.policy.schedulers.flow_match import FlowMatchPolicyScheduler, SdeType


# They hold ᾱ_t of a variance-preserving diffusion, which is all that DDIM's transition needs.
VARIANCE_PRESERVING_SCHEDULERS = (
    diffusers.CogVideoXDDIMScheduler,
    diffusers.CogVideoXDPMScheduler,
    diffusers.DDIMParallelScheduler,
    DDIMScheduler,
    diffusers.DDPMParallelScheduler,
    diffusers.DDPMScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.LCMScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.PNDMScheduler,
    diffusers.SASolverScheduler,
    diffusers.TCDScheduler,
    diffusers.UniPCMultistepScheduler,
)
# Their models are distilled for their own timesteps.
DISTILLED_SCHEDULERS = (diffusers.LCMScheduler, diffusers.TCDScheduler)
DDIM_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

# Their schedules have one `sigmas` value per step, between 0 and 1, if they are set to flow matching.
FLOW_MATCHING_SCHEDULERS = (
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    diffusers.SASolverScheduler,
    diffusers.UniPCMultistepScheduler,
)

# The same flow with a second-order or a consistency step; Euler's schedule takes their config.
FLOW_MATCHING_LIKE_EULER = (diffusers.FlowMatchHeunDiscreteScheduler, diffusers.FlowMatchLCMScheduler)


def policy_scheduler(
    scheduler: SchedulerMixin, eta: float, noise_level: float = 0.7, sde_type: SdeType = "sde"
) -> PolicyScheduler:
    """
    Convert a pipeline's scheduler to the policy scheduler of the same diffusion.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            The pipeline's own scheduler. It is not changed.
        eta (`float`):
            η of the DDIM family, > 0.
        noise_level (`float`, *optional*, defaults to `0.7`):
            Its counterpart for flow matching, > 0.
        sde_type (`"sde"` or `"cps"`, *optional*, defaults to `"sde"`):
            Stochastic form of flow matching.

    Raises:
        `ValueError`: If the scheduler describes neither a variance-preserving diffusion nor flow matching, or clips
            its predictions (the density of a clipped step is not the Gaussian's).
    """
    refuse_clipping(scheduler)
    if is_flow_matching(scheduler):
        return flow_match_policy(scheduler, noise_level, sde_type)
    return ddim_policy(scheduler, eta)


def refuse_clipping(scheduler: SchedulerMixin) -> None:
    """Raise a `ValueError` for a scheduler that clips the predicted image: its steps are not Gaussian."""
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option, False):
            raise ValueError(
                f"pipeline.scheduler.config.{option} is True: a clipped step has no Gaussian density. Switch it off "
                f"with `pipeline.scheduler = {type(scheduler).__name__}.from_config(pipeline.scheduler.config, "
                f"{option}=False)`."
            )


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Return whether the scheduler belongs to a model that predicts a velocity."""
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, *FLOW_MATCHING_LIKE_EULER)):
        return True
    return isinstance(scheduler, FLOW_MATCHING_SCHEDULERS) and scheduler.config.get("use_flow_sigmas", False)


def flow_match_policy(scheduler: SchedulerMixin, noise_level: float, sde_type: SdeType) -> PolicyScheduler:
    """
    Build the policy over the flow matching schedule. Raise a `ValueError` if the model does not predict the velocity.
    """
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction_type != "flow_prediction":
        raise ValueError(
            f"pipeline.scheduler.config.prediction_type is {prediction_type!r} with use_flow_sigmas=True; a flow "
            "matching policy needs 'flow_prediction'."
        )
    euler_like = isinstance(scheduler, FLOW_MATCHING_LIKE_EULER)
    base = FlowMatchEulerDiscreteScheduler if euler_like else scheduler.__class__
    policy = policy_class(FlowMatchPolicyScheduler, base).from_config(own_settings(scheduler))
    if not euler_like:
        vars(policy).update(copy.deepcopy(vars(scheduler)))  # what was set on it later, such as its shift
    policy.noise_level = noise_level
    policy.sde_type = sde_type
    return policy


def ddim_policy(scheduler: SchedulerMixin, eta: float) -> PolicyScheduler:
    """
    Build the DDIM policy with the scheduler's own ᾱ_t. Raise a `ValueError` if the model predicts something else.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, VARIANCE_PRESERVING_SCHEDULERS):
        supported = ", ".join(cls.__name__ for cls in VARIANCE_PRESERVING_SCHEDULERS)
        raise ValueError(
            f"pipeline.scheduler is {name}, whose steps can't be turned into a Gaussian policy. Set "
            f"pipeline.scheduler to one of {supported} if the model was trained with variance-preserving noise, or to "
            "FlowMatchEulerDiscreteScheduler if it was trained with flow matching."
        )
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"pipeline.scheduler.config.prediction_type is {prediction_type!r}; the policy needs one of "
            f"{', '.join(PREDICTION_TYPES)}."
        )
    if scheduler.config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"pipeline.scheduler.config.timestep_type is {scheduler.config.timestep_type!r}: the model was trained on "
            "EDM's noise levels and not on timesteps, so it can't be a policy of the DDIM family."
        )
    settings = own_settings(scheduler)
    settings.pop("snr_shift_scale", None)  # CogVideoX's, which is in its ᾱ_t
    if settings["beta_schedule"] not in DDIM_BETA_SCHEDULES:  # its ᾱ_t are taken over all the same
        settings["beta_schedule"] = "linear"
    base = scheduler.__class__ if isinstance(scheduler, DISTILLED_SCHEDULERS) else DDIMScheduler
    policy = policy_class(DDIMPolicyScheduler, base).from_config(settings, clip_sample=False)
    policy.eta = eta
    policy.alphas_cumprod = scheduler.alphas_cumprod
    if not policy.config.set_alpha_to_one:
        policy.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return policy


def own_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """
    Return a scheduler's config with its class's defaults as if they were given.

    They are part of its diffusion (Heun's betas are not DDIM's), but `from_config` would replace those in
    `_use_default_values` by the defaults of the class it builds. Other classes have no `clip_sample`, and DDIM's is
    True.
    """
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
