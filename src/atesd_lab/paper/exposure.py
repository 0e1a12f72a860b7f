"""Ablation 2: learned exposure beside full, best fixed and random, and the controls that tell adaptive from varied.

The controls are a reward that is shuffled, a policy that is never updated, and the learned ratios in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from atesd.config import Config, CreditConfig, PolicyConfig
from atesd.table import Table
from atesd.text import MISSING, number
from atesd_lab.audit.null_simulation import NullBand, null_band
from atesd_lab.paper.bench import RATIOS, Bench, Findings, best_fixed, main_world
from atesd_lab.paper.claims import Claim, ends_above
from atesd_lab.paper.drawing import accuracy_dots, draw_seeds, panels
from atesd_lab.paper.numbers import printed
from atesd_lab.report.canvas import running_mean, styled
from atesd_lab.report.decisions import Policy, policies
from atesd_lab.report.rows import RunRows, at_common_updates
from atesd_lab.report.svg import INK
from atesd_lab.stats.contrast import Contrast

LEARNED = ("sound", "paper", "bandit", "aligned")
OURS = {"bandit": "the bandit", "aligned": "the aligned exposure"}
RIVALS = ("full", "random", "linear-up")
PREFIX = {"sound": "", "bandit": "bandit-", "aligned": "aligned-"}  # of the names of a controller's own controls
CONTROLS = ("shuffled-reward", "shuffled-replay", "untrained")
SHUFFLED = CONTROLS[:2]
GAINS = ("- best fixed", *(f"- {rival}" for rival in (*RIVALS, *SHUFFLED)))
CLOSE = 0.15
NULL_SEEDS = range(40)
SMOOTH = 20  # updates


def report(bench: Bench) -> Findings:
    """A table per world, what each controller found beside the optimum, ratio curves over the null band."""
    numbers, arms = printed("exposure_ablation_aime24"), list(bench[main_world(bench)].groups)
    return Findings(
        "Learned exposure and its controls: ablation 2",
        (*(_world_table(bench, world) for world in bench), optimum_table(bench), selected_table(bench)),
        {
            "accuracy": accuracy_dots(bench, list(bench), [arm for arm in arms if not is_control(arm)]),
            "controls": accuracy_dots(bench, list(bench), [arm for arm in arms if arm in LEARNED or is_control(arm)]),
            "ratios": _draw_ratios(bench),
        },
        (*_claims(bench, numbers), *_own_claims(bench)),
        (
            "Best fixed: the fixed ratio with the highest mean validation after the last update. Null band: "
            "where the mean of "
            f"the policy's Beta wanders when the reward is nothing but noise: mean and 2 "
            f"deviations over {len(NULL_SEEDS)} seeds.",
            "The bandit is rewarded by the gain of verified success on the probe problems (recipe micro-bandit).",
            "The aligned exposure has no reward; what is shuffled are the verdicts that give its direction.",
        ),
    )


def is_control(arm: str) -> bool:
    """Whether an arm is a control of a controller that is an arm itself."""
    return arm.endswith(CONTROLS)


def _world_table(bench: Bench, world: str) -> Table:
    numbers = printed("exposure_ablation_aime24")
    column = {arm: number(numbers[arm], 4) for arm in ("full", "random")}
    column["fixed-0.5"] = f"{number(numbers['best_fixed_0.5'], 4)} (its best fixed)"
    column["paper"] = column["sound"] = number(numbers["learned"], 4)
    return bench[world].table(list(bench[world].groups), "full", column)


def optimum_table(bench: Bench) -> Table:
    """Per world and controller: late ratio beside the best fixed ratio, and differences from its rivals at the last."""
    rows = []
    for world in bench:
        best = best_fixed(bench[world])
        as_good = [
            ratio
            for arm, ratio in RATIOS.items()
            if arm == best or bench[world].difference(best, arm).verdict != "below"
        ]
        for arm in LEARNED:
            late = bench[world].late_ratios(arm)
            off = fmean(late) - RATIOS[best]
            near = min(abs(fmean(late) - ratio) for ratio in as_good)
            rivals = _against(bench[world].difference, arm, best)
            spread = f"{fmean(late):.2f} ({min(late):.2f} to {max(late):.2f})"
            rows.append(
                (
                    world,
                    arm,
                    f"{RATIOS[best]:g}",
                    ", ".join(f"{ratio:g}" for ratio in as_good if ratio != RATIOS[best]) or MISSING,
                    spread,
                    f"{'yes' if abs(off) <= CLOSE else 'no'} ({off:+.2f})",
                    "yes" if near <= CLOSE else "no",
                    *rivals,
                )
            )
    near_it, near_one = f"within {CLOSE} of it", f"within {CLOSE} of one of these"
    columns = ("world", "controller", "best fixed ratio", "not told from it", "late ratio", near_it, near_one)
    notes = (
        "Differences in points at the last update on test, paired, with 95 % intervals. The best fixed ratio took a "
        "sweep to find.",
        "The best fixed ratio is that of the whole run; where the best ratio moves it is not the best at the end.",
        "Not told from it: the other fixed ratios whose difference from it at the last update is not below 0 by its "
        "interval. These, with the best itself, are those of the last column.",
        "Shuffled reward and shuffled replay are the controller's own; `paper` has none.",
    )
    return Table(
        "What the controllers found",
        (*columns, *GAINS),
        tuple(rows),
        notes,
    )


def selected_table(bench: Bench) -> Table:
    """Per world and controller: the same differences where every run may stop at its own best checkpoint."""
    rows = [
        (world, arm, *_against(bench[world].selected, arm, best_fixed(bench[world])))
        for world in bench
        for arm in LEARNED
    ]
    notes = (
        "Differences in points, paired, with 95 % intervals. The checkpoint of each run is chosen on one half of the "
        "validation problems and scored on the other, so that nothing is scored on what chose it.",
    )
    return Table(
        "What the controllers found, at each run's selected checkpoint",
        ("world", "controller", *GAINS),
        tuple(rows),
        notes,
    )


def _against(difference: Callable[[str, str], Contrast], arm: str, best: str) -> list[str]:
    """The differences from the best fixed ratio, the rivals, and the controller's own controls where it has them."""
    own = [PREFIX[arm] + control if arm in PREFIX else None for control in SHUFFLED]
    return [MISSING if one is None else difference(one, arm).in_points for one in (best, *RIVALS, *own)]


def _claims(bench: Bench, numbers: dict[str, float]) -> list[Claim]:
    """The paper's: learned is above full, best fixed and random. In every world, for both rewards."""
    claims = []
    for world in bench:
        best = best_fixed(bench[world])
        for arm in ("paper", "sound"):
            for rival, key, name in (
                ("full", "full", "full exposure"),
                (best, "best_fixed_0.5", f"the best fixed ratio ({RATIOS[best]:g})"),
                ("random", "random", "random exposure"),
            ):
                gap = f"{numbers['learned'] - numbers[key]:+.2f}"
                claims.append(ends_above(bench[world], arm, rival, f"learned ({arm}) ends above {name}", "paper", gap))
    return claims


def _own_claims(bench: Bench) -> list[Claim]:
    """Ours: what is learned is adaptive, not merely varied, drifted, or a distribution of ratios."""
    claims = []
    for world in bench:
        controls = [arm for arm in CONTROLS if arm in list(bench[world].groups)]
        for control in controls:
            words = f"learned (sound) ends above its control {control}"
            claims.append(ends_above(bench[world], "sound", control, words))
        for arm, name in OURS.items():
            for rival in ("full", "random"):
                claims.append(ends_above(bench[world], arm, rival, f"{name} ends above {rival} exposure"))
            for control in (f"{PREFIX[arm]}{control}" for control in SHUFFLED):
                words = f"{name} ends above its control {control.removeprefix(PREFIX[arm])}"
                claims.append(ends_above(bench[world], arm, control, words))
    return claims


def _null_band(config: Config, decisions: int) -> NullBand:
    """The band of a config's reward, policy and bounds: 10 s for 50 decisions, once for worlds that share these."""
    return _band(config.credit.model_dump_json(), config.policy.model_dump_json(), decisions, config.bounds)


@cache
def _band(credit: str, policy: str, decisions: int, bounds: tuple[float, float]) -> NullBand:
    reward = CreditConfig.model_validate_json(credit)
    return null_band(reward, PolicyConfig.model_validate_json(policy), decisions, NULL_SEEDS, bounds)


@styled
def _draw_ratios(bench: Bench) -> Figure:
    figure, all_axes = panels(len(bench), width=4.6, height=3.6)
    for axes, world in zip(all_axes, bench, strict=True):
        runs = bench[world].runs("sound")
        updates, _ = policy_means(runs[:1])
        band = _null_band(runs[0].config, len(updates))
        middle, reach = np.array(band.mean), 2 * np.array(band.deviation)
        axes.fill_between(
            updates, middle - reach, middle + reach, color=INK, alpha=0.12, linewidth=0, label="null band"
        )
        for index, arm in enumerate(LEARNED):
            mine = bench[world].runs(arm)
            if arm in OURS:
                held = [run.series("reveal_ratio") for run in mine]
                ratios = [(at, running_mean(np.array(values), SMOOTH).tolist()) for at, values in held]
                shared, each = at_common_updates(f"{world}, {arm}: the reveal ratio", ratios)
                draw_seeds(axes, shared, each, index, f"{arm}, mean of {SMOOTH} updates")
            else:
                draw_seeds(axes, *policy_means(mine), index, f"{arm}, mean of the Beta")
        axes.axhline(RATIOS[best_fixed(bench[world])], color=INK, linestyle=":", linewidth=1.4, label="best fixed")
        axes.set(title=world, xlabel="update", ylim=(-0.03, 1.03))
        axes.set_ylabel("reveal ratio")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def policies_at(runs: Sequence[RunRows]) -> tuple[list[int], list[list[Policy]]]:
    """The updates before which all runs decided, and the policy of each run at them. `RunError` without any."""
    held = list(map(policies, runs))
    series = [([policy.start for policy in one], one) for one in held]
    return at_common_updates(f"the policy of {', '.join(run.name for run in runs)}", series)


def policy_means(runs: Sequence[RunRows]) -> tuple[list[int], list[list[float]]]:
    """The updates of these decisions, and the mean of the Beta of each run at them."""
    updates, each = policies_at(runs)
    return updates, [[policy.mean for policy in held] for held in each]
