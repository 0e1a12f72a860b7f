"""The set-point, the search per problem, and a controller of one's own: in a loop, from the settings, and in a run."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest

from atesd.config import Config, SetpointSettings, StaircaseSettings, config_from_mapping, method_name
from atesd.control.controlled import ControlledExposure
from atesd.control.factory import controlled, make_exposure
from atesd.control.interface import Exposure
from atesd.control.setpoint import Setpoint
from atesd.control.staircase import Staircase
from atesd.errors import ConfigError
from atesd.importing import require_offers
from atesd.maths.keyed import generator
from atesd.records import UpdateStats
from quick import cut_after, fingerprint, finished, quick

RNG = generator(0, "test")  # neither controller here draws
DOCS = Path(__file__).parent.parent / "docs" / "controllers.md"
DECIDING = ("bandit", "setpoint", "staircase")


def stats(kl: float = 0.1, **values) -> UpdateStats:
    return UpdateStats(0.5, 0.5, kl, kl, 0.1, 0.5, **values)


def test_the_set_point_steps_by_gain_times_the_log_error():
    setpoint = Setpoint(SetpointSettings(target_kl=0.2, gain=0.1, start=0.5))
    assert setpoint.propose("", RNG) == 0.5
    for kl in (0.05, 0.15):
        setpoint.on_update(stats(kl))
    # The mean KL is 0.1, half the target: 0.5 + 0.1 ln 2
    assert setpoint.features() == pytest.approx((0.1, 0.2))
    assert setpoint.propose("", RNG) == pytest.approx(0.5 + 0.1 * math.log(2))


@pytest.mark.parametrize(("target", "ratio"), [(0.02, 0.3466), (0.06, 0.6212)])
def test_the_set_point_settles_where_the_kl_is_the_target(target, ratio):
    # KL = 0.005 exp(4 ratio): the target is reached at ln(target / 0.005) / 4.
    setpoint = Setpoint(SetpointSettings(target_kl=target))
    for _ in range(40):
        setpoint.on_update(stats(0.005 * math.exp(4 * setpoint.propose("", RNG))))
    assert setpoint.propose("", RNG) == pytest.approx(ratio, abs=1e-3)


def test_without_a_target_the_first_kl_is_kept_so_that_the_ratio_rises_as_the_student_learns():
    setpoint, ratios = Setpoint(SetpointSettings()), []
    for update in range(40):
        ratios.append(setpoint.propose("", RNG))
        setpoint.on_update(stats(0.005 * math.exp(4 * ratios[-1] - update / 40)))
    assert ratios[0] == ratios[1] == 0.5
    assert ratios[-1] > 0.7


def test_at_a_bound_the_integral_does_not_wind_up():
    setpoint = Setpoint(SetpointSettings(target_kl=0.1, ratio_min=0.2, ratio_max=0.6))
    for kl in [0.001] * 50 + [0.5]:
        setpoint.propose("", RNG)
        setpoint.on_update(stats(kl))
    assert setpoint.propose("", RNG) < 0.6  # one KL above the target is enough to leave the bound


@pytest.mark.parametrize("kl", [math.nan, math.inf, 0.0, -1e-9])
def test_a_kl_without_a_log_leaves_the_set_point_a_ratio(kl):
    setpoint = Setpoint(SetpointSettings(target_kl=0.1))
    setpoint.on_update(stats(kl))
    assert 0.0 <= setpoint.propose("", RNG) <= 1.0


def test_a_solved_problem_is_shown_more_and_an_unsolved_one_less():
    search = Staircase(StaircaseSettings(step_solved=0.1, step_unsolved=-0.2, start=0.5))
    search.on_update(stats(group_success=(("a", 1.0), ("b", 0.0), ("c", 1.0), ("c", 0.0))))
    # c: one solved and one unsolved rollout, (0.1 - 0.2) / 2
    assert [search.propose(group, RNG) for group in "abc"] == pytest.approx([0.6, 0.3, 0.45])


def test_a_new_problem_starts_at_the_mean_of_those_met():
    search = Staircase(StaircaseSettings(step_solved=0.1, step_unsolved=-0.2, start=0.5))
    search.on_update(stats(group_success=(("a", 1.0), ("b", 0.0))))
    assert search.propose("new", RNG) == pytest.approx((0.6 + 0.3) / 2) == search.features()[0]


def test_the_search_stays_between_the_bounds():
    search = Staircase(StaircaseSettings(ratio_min=0.3, ratio_max=0.6))
    for _ in range(9):
        search.on_update(stats(group_success=(("a", 1.0), ("b", 0.0))))
    assert [search.propose(group, RNG) for group in "ab"] == [0.6, 0.3]


def config(kind: str, **groups) -> Config:
    return config_from_mapping({**groups, "exposure": {"kind": kind, **groups.get("exposure", {})}})


def drive(made: Exposure, updates: range) -> list:
    """What an exposure said, update by update; successes and KL are keyed noise."""
    said = []
    for update in updates:
        ratios = {group: made.reveal_ratio(update, group) for group in ("p1", "p2")}
        u, v, w = generator(1, "stats", update).random(3).tolist()
        graded = (("p1", float(u > 0.5)), ("p2", float(w > 0.5)))
        wanted = "probe_success" in made.measurements(update)
        seen = stats(0.1 + u, probe_success=v if wanted else None, group_success=graded)
        said.append((ratios, made.observe(update, seen)))
    return said


@pytest.mark.parametrize("kind", DECIDING)
def test_a_cut_after_any_update_changes_nothing(kind):
    whole = make_exposure(config(kind), 40, 0)
    said, states = [], []
    for update in range(20):
        said += drive(whole, range(update, update + 1))
        states.append(json.dumps(whole.state_dict(), allow_nan=False, sort_keys=True))
    for cut in range(19):
        after = make_exposure(config(kind), 40, 0)
        after.load_state_dict(json.loads(states[cut]))
        assert drive(after, range(cut + 1, 20)) == said[cut + 1 :]
        assert json.dumps(after.state_dict(), sort_keys=True) == states[-1]


@pytest.mark.parametrize("kind", DECIDING)
def test_every_controller_logs_the_reward_of_its_decisions(kind):
    decisions = [f for _, some in drive(make_exposure(config(kind), 40, 0), range(13)) for f in some]
    assert [finished.decision.update for finished in decisions] == [0, 4, 8]
    success = [float(generator(1, "stats", update).random(3)[1]) for update in (0, 4, 8, 12)]
    gains = [(after - before) * 0.9**3 for before, after in pairwise(success)]
    assert [finished.reward for finished in decisions] == pytest.approx(gains)


@pytest.mark.parametrize(
    ("kind", "wanted", "fix"),
    [
        ("bandit", "per_problem", "exposure.kind: .*learned.* would read it"),
        ("setpoint", "per_difficulty", "exposure.kind: .*staircase.* would read it"),
        ("staircase", "update", "expected 'per_difficulty' or 'per_problem'"),
    ],
)
def test_a_granularity_that_a_kind_does_not_have_is_refused_with_the_fix(kind, wanted, fix):
    with pytest.raises(ConfigError, match=fix):
        config(kind, exposure={"granularity": wanted})


def test_a_staircase_brings_its_granularity():
    assert config("staircase").granularity == "per_problem"
    assert config("staircase", exposure={"granularity": "per_difficulty"}).granularity == "per_difficulty"


def test_the_former_name_of_the_staircase_still_loads():
    assert config("per_problem") == config("staircase")


@pytest.mark.parametrize("kind", ["bandit", "staircase"])
def test_what_learns_from_verdicts_needs_a_checker(kind):
    with pytest.raises(ConfigError, match="checker"):
        config(kind, data={"checker": "none"}, credit={"progress_signal": "probe_success"})


@pytest.mark.parametrize("kind", ["full", "random", "learned", *DECIDING])
def test_every_exposure_offers_what_the_protocol_asks(kind):
    made = make_exposure(config(kind), 40, 0)
    require_offers(made, Exposure, kind, "")
    assert made.dropped == {}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nowhere.at.all:make", "cannot be imported.*PYTHONPATH"),
        ("json:absent", "cannot be imported"),
        ("json", "expected module:function"),
        ("test_controllers:no_exposure", "made a object without dropped, measurements"),
    ],
)
def test_a_factory_that_makes_no_exposure_is_refused(factory, message):
    with pytest.raises(ConfigError, match=message):
        make_exposure(config("custom", exposure={"factory": factory}), 8, 0)


def no_exposure(*_: object) -> object:
    return object()


def test_a_custom_exposure_needs_a_factory():
    with pytest.raises(ConfigError, match=r"kind: custom needs factory: module:function"):
        config("custom")


@pytest.mark.parametrize(
    ("exposure", "name"),
    [
        ({"kind": "bandit"}, "bandit over 5 ratios (sound credit)"),
        ({"kind": "setpoint"}, "set-point on KL (its first)"),
        ({"kind": "staircase"}, "search per problem"),
        ({"kind": "custom", "factory": "mine:make"}, "custom (mine:make)"),
    ],
)
def test_a_controller_has_a_name_in_every_table(exposure, name):
    assert method_name(config_from_mapping({"exposure": exposure})) == name


def test_a_signal_that_is_not_the_presets_own_is_named():
    assert (
        method_name(config("learned", credit={"progress_signal": "probe_gain"})) == "ATESD (sound credit, probe_gain)"
    )


@pytest.mark.parametrize("kind", ["bandit", "staircase"])
def test_a_run_cut_after_an_update_goes_on_to_the_same_end(kind, tmp_path: Path):
    settings = quick(f"exposure.kind={kind}", "credit.progress_signal=probe_gain")
    whole = finished(settings, tmp_path / "whole")
    rows = whole.rows("decisions")
    assert [row["update"] for row in rows] == [0, 2, 4, 6]
    assert [row["status"] for row in rows] == ["finished", "finished", "finished", "pending"]
    again = finished(settings, cut_after(whole, 3, tmp_path / "cut"))
    assert fingerprint(again) == fingerprint(whole)


def test_the_worked_example_trains_resumes_and_shows_up_in_the_log(tmp_path: Path, monkeypatch):
    (source,) = re.findall(r"```python\n# halving\.py\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    (tmp_path / "halving.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    settings = quick("exposure.kind=custom", "exposure.factory=halving:make", "exposure.factory_settings.step=0.2")
    made = make_exposure(settings, 8, 0)
    assert isinstance(made, ControlledExposure)
    whole = finished(settings, tmp_path / "whole")
    assert len(whole.rows("decisions")) == 4
    again = finished(settings, cut_after(whole, 5, tmp_path / "cut"))
    assert fingerprint(again) == fingerprint(whole)


def test_a_controller_made_by_hand_is_an_exposure():
    made = controlled(
        Setpoint(SetpointSettings(start=0.25)), quick("exposure.kind=custom", "exposure.factory=mine:make"), 0
    )
    assert made.reveal_ratio(0) == 0.25
