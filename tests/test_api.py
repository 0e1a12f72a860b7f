"""What a notebook imports: the public names, and that asking for them costs nothing until they are used."""

import inspect
import subprocess
import sys

import pytest

import atesd
from atesd import build
from quick import quick


def test_the_public_names_are_pinned():
    assert atesd.__all__ == [
        "AtesdError",
        "Config",
        "Exposure",
        "FixedExposure",
        "LearnedExposure",
        "RunFolder",
        "UpdateStats",
        "__version__",
        "load_config",
    ]


@pytest.mark.parametrize("name", atesd.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(atesd, name) is not None
    assert name in dir(atesd)


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(AttributeError, match="no attribute 'LearnedExposures'; public names: AtesdError"):
        _ = atesd.LearnedExposures


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("train", ["config", "out", "resume", "listeners", "command"]),
        ("build", ["config", "problems"]),
        ("evaluate", ["config", "split", "update"]),
    ],
)
def test_the_verbs_of_a_notebook_are_pinned(function: str, parameters: list[str]):
    found = list(inspect.signature(getattr(build, function)).parameters)
    assert found[: len(parameters)] == parameters


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, atesd; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "pydantic", "numpy", "yaml"} & set(modules) == set()


def test_the_controller_drives_somebody_elses_loop():
    exposure = atesd.LearnedExposure(num_updates=40, seed=1)
    ratios = []
    for update in range(40):
        ratios.append(exposure.reveal_ratio(update))
        measured = {"probe_success": 0.5 + 0.01 * update} if "probe_success" in exposure.measurements(update) else {}
        stats = atesd.UpdateStats(
            reveal_ratio=ratios[-1],
            effective_ratio=ratios[-1],
            loss=0.5,
            kl=0.5,
            top1_disagreement=0.1,
            student_confidence=0.9,
            **measured,
        )
        exposure.observe(update, stats)
    assert len(set(ratios)) == 10  # a decision every 4 updates
    assert all(0 <= ratio <= 1 for ratio in ratios)


def test_evaluating_a_config_gives_the_same_row_twice():
    row = build.evaluate(quick(), "validation")
    assert row == build.evaluate(quick(), "validation")
    assert (row["split"], row["problems"], row["update"]) == ("validation", 4, 0)
