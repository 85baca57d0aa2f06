"""Every pipeline of the suite passes every check. `make conformance` prints the table."""

import diffusers
import pytest

from conformance.checks import CASES, CHECKS, it_is_refused_with_the_cause
from conformance.image_prompt_pipelines import IMAGE_PROMPT_CASES
from conformance.input_pipelines import INPUT_CASES
from conformance.more_pipelines import MORE_CASES
from conformance.refused_pipelines import REFUSALS
from conformance.table import DOCUMENT
from ddpo_trl.versions import installed


# The checks that every pipeline of the first half runs in the quick suite.
OF_ALL = ("replay = sampling", "gradients", "own sampler")

# The pipelines that prove the others there: one of each kind of network and scheduler at least.
FAMILIES = [
    "Stable Diffusion 1.x",
    "Stable Diffusion inpainting",
    "PixArt-Sigma",
    "FLUX.1",
    "Wan 2.1",
    "Kandinsky 2.2",
]
# Pipelines whose layers see other shapes, or whose adapter is saved in another way.
LAYOUTS = [*FAMILIES, "Stable Diffusion XL", "Sana", "CogVideoX", "Lumina 2", "Qwen-Image", "Z-Image", "FLUX.2 klein"]
PROOFS = {
    **dict.fromkeys(["prompt matters", "one round", "encoded once"], FAMILIES),
    **dict.fromkeys(["save, reload", "cache"], LAYOUTS),
    "one pass": [*LAYOUTS, "Stable Diffusion 3", "AnimateDiff", "Chroma"],
    "doctor": ["FLUX.1", "Wan 2.1", "Stable Diffusion IP-Adapter", "FLUX.2 klein with a reference image"],
    "same prompt twice": ["FLUX.1", "Qwen-Image", "Z-Image", "HiDream"],
    "other inputs": [
        "Stable Diffusion image-to-image",
        "FLUX.2 klein with a reference image",
        "Stable Diffusion IP-Adapter",
        "Stable Diffusion 3 ControlNet",
    ],
    "batch size 1": [
        "Stable Diffusion 1.x",
        "FLUX.2 klein with a reference image",
        "Stable Diffusion, guidance rescale per sample",
    ],
    "networks kept": [
        "Stable Diffusion, perturbed attention",
        "Stable Diffusion IP-Adapter",
        "HunyuanDiT ControlNet",
    ],
    "input for all": [
        "Stable Diffusion image-to-image",
        "Stable Diffusion T2I-Adapter",
        "Stable Diffusion 3 ControlNet",
    ],
}
# The other checks that the pipelines of the second half run in the quick suite: those that show their kind.
QUICK = {
    **dict.fromkeys((case.name for case in INPUT_CASES), ("replay = sampling",)),
    **dict.fromkeys((case.name for case in MORE_CASES), ("replay = sampling", "own sampler")),
}
# The one check that shows what is particular to a pipeline with an image in its prompt; the others are slow.
POINTS = {
    **dict.fromkeys((case.name for case in IMAGE_PROMPT_CASES), ""),
    "FLUX.1 Kontext inpainting": "own sampler",
    "Wan image-to-video": "replay = sampling",  # its image is not in a list
    "Qwen-Image-Edit": "encoded once",
    "Qwen-Image-Edit-Plus": "batch size 1",
    "HunyuanVideo image-to-video": "own sampler",  # its first frame is not part of the state
}
SLOW_REFUSALS = ["FramePack, two sections", "Cosmos 2 video-to-world"]

# Pipelines that diffusers before 0.42 can't build or run at the size of the tests.
NEWER = {
    "HunyuanVideo image-to-video": "its encode_prompt fails with the tiny tokenizer",
    "LTX-2": "its networks have other arguments",
}


def skip_newer(name: str) -> None:
    if name in NEWER and installed("diffusers") < (0, 42):
        pytest.skip(f"{name} with diffusers {diffusers.__version__}: {NEWER[name]}")


def is_quick(name: str, title: str) -> bool:
    if name in POINTS:
        return title == POINTS[name]
    if title in PROOFS:
        return name in PROOFS[title]
    return title in QUICK.get(name, OF_ALL)


PAIRS = [
    pytest.param(case, check, id=f"{case.name}-{title}", marks=[] if is_quick(case.name, title) else pytest.mark.slow)
    for case in CASES
    for title, check in CHECKS.items()
]


@pytest.mark.parametrize(("case", "check"), PAIRS)
def test_a_pipeline_is_a_policy(case, check):
    skip_newer(case.name)
    check(case)


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(each, id=each.case.name, marks=pytest.mark.slow if each.case.name in SLOW_REFUSALS else [])
        for each in REFUSALS
    ],
)
def test_a_pipeline_that_can_not_be_a_policy_is_refused_with_the_cause(refusal):
    skip_newer(refusal.case.name)
    it_is_refused_with_the_cause(refusal)


def test_the_documented_table_is_that_of_the_suite():
    """Stale, if this fails: run `make conformance`."""
    text, _, refused = DOCUMENT.read_text().partition("## Refused")
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["pipeline", *CHECKS]
    assert [row.strip("|").split("|")[0].strip() for row in rows] == [case.name for case in CASES]
    _, _, *rows = [line for line in refused.splitlines() if line.startswith("|")]
    assert [row.strip("|").split("|")[0].strip() for row in rows] == [each.case.name for each in REFUSALS]
    assert all((check.__doc__ or "").strip() in text for check in CHECKS.values())
