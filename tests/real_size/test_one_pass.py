"""One pass at the size of SDXL: its cost, with activation checkpointing, and where memory is short."""

from collections.abc import Callable

import pytest

from ddpo_trl.policy.policy import Policy
from one_pass_cost import Cost, step_costs
from real_size.families import FAMILIES
from real_size.rounds import OFFLOADED, ONE_PASS, config, trained
from real_size.simulated_gpu import SimulatedGPU


# Shares of two passes, written down before they were counted: of its operations, of its training step's peak.
BARS = {False: (0.70, 1.03), True: (0.78, 1.03)}  # without and with activation checkpointing


@pytest.mark.parametrize("checkpointing", BARS, ids=["all activations kept", "checkpointing"])
def test_one_pass_costs_less_than_two_at_the_peak_of_a_training_step(tmp_path, checkpointing):
    gpu = SimulatedGPU()
    pipeline = FAMILIES["SDXL"].pipeline(gpu)
    runs = iter(("sampling", "training", "one pass"))

    def measure(run: Callable[[], object]) -> Cost:
        with gpu.during(phase := next(runs)):
            run()
        return Cost(gpu.operations[phase], gpu.peaks[phase])

    with gpu:
        policy = Policy.from_pipeline(pipeline.to("cuda"), config(tmp_path))
        if checkpointing:
            policy.activation_checkpointing_enable()
        costs = step_costs(policy, policy.context(["a cat"], [{}], [0]), measure)
    print(f"operations {costs.operations:.3f}, peak {costs.peak:.3f}")
    most, highest = BARS[checkpointing]
    assert costs.operations <= most and costs.peak <= highest


def test_a_round_with_activation_checkpointing_stays_within_its_forecast(tmp_path):
    gpu = SimulatedGPU()
    pipeline = FAMILIES["SDXL"].pipeline(gpu)
    with gpu:
        settings = config(tmp_path, **ONE_PASS, **OFFLOADED, gradient_checkpointing=True)
        trainer = trained(gpu, settings, pipeline, evaluate=False)
    assert trainer.plan.one_pass
    forecast, peak = max(trainer.plan.forecast_peaks.values()), max(gpu.peaks.values())
    print(f"forecast {forecast / 2**30:.2f} GiB, simulated {peak / 2**30:.2f} GiB")
    assert 0.7 * forecast <= peak <= 1.05 * forecast


def test_a_batch_that_does_not_fit_is_sampled_in_parts(tmp_path):
    gpu = SimulatedGPU(capacity=30)  # GiB: one sample takes 20, two take 33
    pipeline = FAMILIES["SDXL"].pipeline(gpu)
    sizes = {"per_device_sample_batch_size": 2, "per_device_train_batch_size": 2}
    with gpu:
        trainer = trained(gpu, config(tmp_path, **ONE_PASS, **OFFLOADED, **sizes), pipeline, evaluate=False)
    assert trainer.plan.one_pass and trainer.plan.samples_per_part == 1
    assert "in parts of 1 samples" in str(trainer.plan)
    assert max(gpu.peaks.values()) <= 30 * 2**30
