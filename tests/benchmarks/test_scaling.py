"""benchmarks/scaling.py: the line it fits is the least squares one, and its points are rounds that can be run."""

import pytest

from ddpo_trl.rollout.plan import plan_batches
from scaling import AXES, BASE, FIGURES, PASSES, SHARED, TEAMS, Point, environments, fit_line, make_config, summary


POINTS = list(dict.fromkeys(point for axis in AXES.values() for point in axis.points.values()))


def test_a_straight_line_is_found_and_nothing_deviates():
    assert fit_line([1, 2, 5], [3.0, 5.0, 11.0]) == pytest.approx((1, 2, 0))


def test_the_line_of_three_points_is_the_one_worked_out_by_hand():
    # Means 2 and 7/3, slope (1·4/3 + 1·5/3) / 2; at 1 the line is at 5/6 in place of 1, at 2 at 7/3 in place of 2.
    assert fit_line([1, 2, 3], [1.0, 2.0, 4.0]) == pytest.approx((-2 / 3, 3 / 2, 1 / 6))


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_varies_one_size_from_the_base_point(axis):
    points = list(AXES[axis].points.values())
    assert BASE in points
    varied = {name for name in Point._fields if len({point._asdict()[name] for point in points}) > 1}
    assert len(varied) == 1


@pytest.fixture(autouse=True)
def runs_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_FOLDER", str(tmp_path))  # as each process of a team has it


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_every_point_is_a_round_of_its_size(point, one_pass):
    config = make_config(point, one_pass)
    plan = plan_batches(config, stds=[0.1] * config.num_inference_steps)
    assert (plan.samples_per_round, plan.transitions_per_sample) == (point.samples, point.steps)
    assert config.pipeline_kwargs["height"] % 8 == 0, "Stable Diffusion asks for it"


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
def test_every_team_shares_the_same_samples(team):
    trainers = 1 if team.together else team.processes
    point = SHARED._replace(samples=SHARED.samples // trainers)
    plan = plan_batches(make_config(point, True, team.processes // trainers), stds=[0.1] * point.steps)
    assert plan.samples_per_process * team.processes == SHARED.samples


def test_every_process_has_the_threads_of_its_team_and_only_those_of_one_trainer_a_rank():
    for team in TEAMS.values():
        found = environments(team)
        assert [each["OMP_NUM_THREADS"] for each in found] == ["1"] * team.processes
        ranks = ["0", "1"] if team.together and team.processes == 2 else [None] * team.processes
        assert [each.get("RANK") for each in found] == ranks
        folders = {each["RUNS_FOLDER"] for each in found}  # the processes of a run write to one, two runs to two
        assert len(folders) == (1 if team.together else team.processes)


def test_a_round_is_told_relative_to_the_base_point_by_the_median():
    figures = {passes: {name: [1.0] for name in FIGURES} for passes in PASSES}
    figures["one pass"] |= {"seconds": [3.0, 2.0, 7.0], "attention": [0.25]}
    found = summary(figures, {"one pass": 2.0, "two passes": 4.0})
    assert found["two passes"]["ratio"] == 0.25
    of_one_pass = {"ratio": 1.5, "from": 1.0, "to": 3.5, "planned_MiB": 1.0, "peak_MiB": 1.0, "attention_share": 0.25}
    assert found["one pass"] == of_one_pass
