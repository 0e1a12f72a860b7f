"""The bad-teacher experiment: which runs it makes, what its table says, and the world it stands on."""

from pathlib import Path

import pytest

from atesd.config import load_config
from atesd_lab.report.arms import Arms
from atesd_lab.report.groups import RunGroup
from atesd_lab.report.rows import RunRows
from atesd_lab.studies.bad_teacher import ARMS, draw_endings, endings_table, job_of
from fake_run import fake_config


def run(seed: int, last: float) -> RunRows:
    """Eight updates; the last two reveal 0.7 and 0.9."""
    config = fake_config(8, seed)
    metrics = tuple({"update": i, "reveal_ratio": ratio} for i, ratio in enumerate((0.2,) * 6 + (0.7, 0.9)))
    ends = [(split, update, value) for split in ("test", "validation") for update, value in ((0, 0.5), (8, last))]
    rows = tuple({"split": split, "update": update, "average": {"value": value}} for split, update, value in ends)
    return RunRows("run", config, {}, metrics, (), rows, ())


def endings() -> Arms:
    """Two seeds of every arm: 0.4 and 0.6 at the end, a ratio that rises from 0.2 to 0.8 in the last quarter."""
    return Arms("bad", {arm: RunGroup(arm, (run(0, 0.4), run(1, 0.6))) for arm in ARMS})


def test_arms_of_one_seed_differ_in_exposure_and_credit_alone():
    configs = [load_config(job.recipe, job.overrides) for job in (job_of(arm, 3, 40, Path("out")) for arm in ARMS)]
    assert len({job_of(arm, seed, 40, Path("out")).folder for arm in ARMS for seed in range(2)}) == 2 * len(ARMS)
    for config in configs:
        assert config.model.path == "world:bad"
        assert config.train.seed == 3
        same = {"exposure": configs[0].exposure, "credit": configs[0].credit}
        assert config.model_copy(update=same) == configs[0]


def test_the_table_shows_every_seed_beside_the_mean():
    text = endings_table(endings())
    assert text.count("50.0 (40.0, 60.0)") == len(ARMS)
    assert text.count("0.80 (0.80, 0.80)") == len(ARMS)  # the last two of eight updates: 0.7 and 0.9


def test_the_figure_is_written_the_same_twice(tmp_path: Path):
    drawn = []
    for _ in range(2):
        draw_endings(endings(), tmp_path)
        drawn.append([(tmp_path / f"bad-teacher.{kind}").read_bytes() for kind in ("svg", "png")])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("arm", ["learned, paper", "learned, sound"])
def test_the_two_rewards_are_the_two_presets(arm: str):
    job = job_of(arm, 0, 40, Path("out"))
    config = load_config(job.recipe, job.overrides)
    assert config.credit.preset == arm.removeprefix("learned, ")
    assert config.credit.progress_signal == ("train_kl" if "paper" in arm else "probe_success")
