"""Waits of the host between denoising steps that are known, with the reason for each."""

from collections.abc import Iterable

from real_size.simulated_gpu import Wait


# By the place, or by the innermost function of a library alone. None is this package's own.
KNOWN = {
    "policy/runner.py:run < diffusers/utils/torch_utils.py:randn_tensor": "noise that a pipeline draws itself",
    "diffusers/models/transformers/transformer_qwenimage.py:_get_device_freqs": "rotary frequencies kept on the CPU",
    "diffusers/models/transformers/transformer_qwenimage.py:compute_text_seq_len_from_mask": "lengths of the prompts",
    "diffusers/models/transformers/transformer_lumina2.py:_get_freqs_cis": "rotary frequencies kept on the CPU",
    "diffusers/models/transformers/transformer_lumina2.py:forward": "lengths of the prompts, read from their mask",
    "diffusers/models/transformers/transformer_chroma.py:forward": "a guidance of zeros, made on the CPU",
    "diffusers/pipelines/aura_flow/pipeline_aura_flow.py:__call__": "a timestep tensor made from a number",
    "diffusers/pipelines/hunyuandit/pipeline_hunyuandit.py:__call__": "a timestep tensor made from a number",
    **dict.fromkeys(
        [
            "diffusers/pipelines/flux/pipeline_flux_inpaint.py:__call__",
            "diffusers/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3_inpaint.py:__call__",
            "diffusers/pipelines/z_image/pipeline_z_image_inpaint.py:__call__",
            "diffusers/schedulers/scheduling_flow_match_euler_discrete.py:scale_noise",
        ],
        "inpainting: the noise level of the next step is read to put the given image back",
    ),
}


def is_own_sampler(wait: Wait) -> bool:
    """Return whether a pipeline's own sampler waits, in evaluation: diffusers' schedulers read their timestep."""
    return wait.phase == "evaluation" and "diffusers/schedulers/" in wait.place


def unexplained(waits: Iterable[Wait]) -> list[str]:
    """Return the waits without a reason, as kind and place."""
    return sorted(
        {
            f"{wait.kind}: {wait.place}"
            for wait in waits
            if not is_own_sampler(wait) and KNOWN.keys().isdisjoint([wait.place, wait.place.rpartition(" < ")[2]])
        }
    )
