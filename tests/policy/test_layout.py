"""Where a state is in what `prepare_latents` returned: learned from numbered elements, and written back."""

import pytest
import torch
from torch import Tensor

from ddpo_trl.policy.schedulers.layout import WHOLE, learn_layout, numbered


def learned(prepared: Tensor, to_state, batch_size: int = 2):
    return learn_layout(
        batch_size, prepared.numel(), to_state(prepared), [to_state(each) for each in numbered(prepared)]
    )


def frames_in_rows(latents: Tensor) -> Tensor:
    """(B, C, F) to (B F, C), as pipelines do whose scheduler steps frames."""
    return latents.permute(0, 2, 1).flatten(0, 1)


def without_first_frame(latents: Tensor) -> Tensor:
    return latents[:, :, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [4, 5000])  # numbers beyond what bfloat16 and float16 hold
def test_frames_as_rows_are_written_back_as_frames(dtype, frames):
    prepared = torch.randn(2, 3, frames).to(dtype)
    layout = learned(prepared, frames_in_rows)
    wanted = torch.randn(2, 3, frames).to(dtype)
    state = frames_in_rows(wanted).view(2, frames, 3)  # as it is recorded: a row for each sample
    assert torch.equal(layout.put(prepared, state), wanted)
    assert torch.equal(layout.put(prepared[:1], state[:1]), wanted[:1])  # a smaller micro-batch


def test_what_the_state_does_not_hold_is_kept():
    prepared = torch.randn(2, 3, 4)
    state = torch.randn(2, 3, 3)
    before = prepared.clone()
    filled = learned(prepared, without_first_frame).put(prepared, state)
    assert torch.equal(prepared, before)  # which the next step is put into
    assert torch.equal(filled[:, :, :1], prepared[:, :, :1])
    assert torch.equal(filled[:, :, 1:], state)


def test_what_the_pipeline_puts_there_itself_is_left_to_it():
    def with_condition(latents: Tensor) -> Tensor:
        return torch.cat([torch.full_like(latents[:, :, :1], 2.0), latents[:, :, 1:]], dim=2)

    prepared = torch.randn(2, 3, 4)
    state = with_condition(torch.randn(2, 3, 4))
    filled = learned(prepared, with_condition).put(prepared, state)
    assert torch.equal(filled[:, :, 1:], state[:, :, 1:])
    assert torch.equal(filled[:, :, :1], prepared[:, :, :1])


@pytest.mark.parametrize(
    "to_state",
    [
        lambda x: 0.5 * x + 0.1,
        lambda x: 0.5 * x,
        lambda x: x + 0.3,
        lambda x: 2.0 * x,
        lambda x: x - x.mean(),
        lambda x: torch.zeros_like(x),
    ],
    ids=["scaled", "halved", "shifted", "doubled", "mixed", "dropped"],
)
def test_latents_that_are_computed_with_are_refused(to_state):
    with pytest.raises(ValueError, match="can't be handed to the pipeline to be replayed"):
        learned(torch.randn(2, 3, 4), to_state)


def with_condition_in_the_first_sample(latents: Tensor) -> Tensor:
    state = latents.clone()
    state[0, :, 0] = 2.0
    return state


@pytest.mark.parametrize(
    "to_state",
    [lambda x: x.flip(0), lambda x: x[..., [0, 0]], with_condition_in_the_first_sample],
    ids=["across samples", "copies", "kept in one sample only"],
)
def test_samples_that_are_exchanged_and_elements_that_are_copied_are_refused(to_state):
    with pytest.raises(ValueError, match="in another way for each sample, or copies"):
        learned(torch.randn(2, 3, 4), to_state)


def test_as_a_rule_the_latents_are_the_state():
    state = torch.randn(2, 3)
    assert WHOLE.put(torch.zeros(2, 3), state) is state
