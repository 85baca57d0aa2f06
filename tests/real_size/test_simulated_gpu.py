"""The simulated GPU behaves as a device does: it is the measure of the other tests here."""

import pytest
import torch
from torch import nn

from real_size.simulated_gpu import SimulatedGPU


MiB = 2**20


@pytest.fixture
def gpu():
    with SimulatedGPU() as gpu:
        yield gpu


def test_tensors_of_two_devices_are_not_mixed(gpu):
    weights = torch.zeros(4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="device"):
        weights @ torch.zeros(4, 4)
    assert (weights @ weights).device.type == "cuda"


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda tensor: tensor.sum().item(), "item"),
        (lambda tensor: tensor.sum().tolist(), "item"),
        (lambda tensor: tensor.cpu(), "copy to the CPU"),
        (lambda tensor: torch.zeros(MiB).copy_(tensor), "copy to the CPU"),
        (lambda tensor: tensor.copy_(torch.zeros(MiB)), "blocking copy to the GPU"),
        (lambda tensor: torch.zeros(8).to("cuda"), "blocking copy to the GPU"),
        (lambda tensor: torch.zeros(8).to("cuda", non_blocking=True), "blocking copy to the GPU"),  # not pinned
        (lambda tensor: torch.cuda.synchronize(), "synchronize"),
        (lambda tensor: torch.equal(tensor, tensor), "equal"),
        (lambda tensor: tensor[tensor > 0], "index with a mask"),
    ],
)
def test_reading_and_blocking_copies_are_waits(gpu, read, kind):
    read(torch.randn(MiB, device="cuda"))
    assert [wait.kind for wait in gpu.waits] == [kind]


def test_what_stays_on_the_device_is_no_wait(gpu):
    values = torch.randn(MiB, device="cuda")
    copied = torch.zeros(8).pin_memory().to("cuda", non_blocking=True)
    (values.relu() * 2 + copied.sum()).to(torch.bfloat16).clone()
    assert gpu.waits == []


def test_small_values_that_are_known_survive(gpu):
    timesteps = torch.tensor([999, 666, 333]).to("cuda")
    assert (timesteps[1] + 1).item() == 667
    assert (timesteps > 500).sum().item() == 2
    assert torch.randn(MiB, device="cuda").mean().item() == 0


def test_a_copy_back_has_the_shape_and_the_dtype(gpu):
    back = torch.randn(3, 5, device="cuda", dtype=torch.bfloat16).cpu()
    assert type(back) is torch.Tensor and back.shape == (3, 5) and back.dtype == torch.bfloat16


def test_bytes_are_counted_by_storage(gpu):
    with gpu.during("peak"):
        first = torch.empty(MiB, device="cuda")
        view = first[: MiB // 2].reshape(2, -1)
        second = first.half()
        assert gpu.current == 4 * MiB + 2 * MiB
        del first
        assert gpu.current == 4 * MiB + 2 * MiB  # the view holds it
        del view, second
    assert gpu.current == 0 and gpu.peaks["peak"] == 6 * MiB


def test_a_backward_pass_holds_what_it_needs(gpu):
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh()) for _ in range(8)]).to("cuda")
    values = torch.randn(1024, 256, device="cuda")
    weights, output = 256 * 256 * 4, 1024 * 256 * 4
    assert gpu.current == 8 * weights + output
    result = layers(values)
    assert gpu.current == 8 * weights + output + 8 * output  # each tanh keeps its result
    result.sum().backward()
    del result
    assert gpu.current == 2 * 8 * weights + output


def test_operations_are_counted(gpu):
    with gpu.during("product"):
        torch.randn(32, 64, device="cuda") @ torch.randn(64, 16, device="cuda")
    assert gpu.operations["product"] == 2 * 32 * 64 * 16


def test_a_full_card_raises_the_error_of_pytorch():
    with SimulatedGPU(capacity=1) as gpu:
        half = torch.empty(512 * MiB // 4, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 600.00 MiB"):
            torch.empty(600 * MiB // 4, device="cuda")
        assert gpu.current == half.nbytes


def test_an_optimizer_steps_without_values(gpu):
    layer = nn.Linear(16, 16).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(4, 16, device="cuda")).sum().backward()
    optimizer.step()
    assert all(state["exp_avg"].is_cuda for state in optimizer.state.values())
