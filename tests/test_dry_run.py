"""The dry run says which exposure, loss, teacher, learning rate and seed will act."""

import pytest

from atesd.cli.plan import acting_lines, budget_line
from atesd.config import load_config

IDLE_GAMMA = "credit.discount (gamma): no effect, as each window holds one fall of the progress signal; it acts with"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "exposure: learned: ATESD (sound credit)"),
        (["exposure.kind=fixed", "exposure.reveal_ratio=0.3"], "exposure: fixed, reveal_ratio 0.3: fixed ratio 0.3"),
        (["exposure.kind=bandit", "exposure.arms=3"], "exposure: bandit, arms 3: bandit over 3 ratios (sound credit)"),
        ([], f"{IDLE_GAMMA} credit.probe_every below credit.lookahead_updates"),
        (
            ["credit.lookahead_updates=1"],
            f"{IDLE_GAMMA} credit.lookahead_updates above 1 and credit.probe_every below credit.lookahead_updates",
        ),
        (
            ["credit.preset=paper", "credit.lookahead_updates=1", "credit.grounding_weight=0"],
            f"{IDLE_GAMMA} credit.lookahead_updates above 1",
        ),
        (
            ["loss.divergence=sampled_token", "sampling.top_p=0.9", "loss.temperature=2"],
            "loss.divergence sampled_token: biased, as the tokens are not drawn from the student itself; "
            "set sampling.top_p: 1, loss.temperature: null",
        ),
        (["exposure.policy.learning_rate=0"], "exposure: learned, policy.learning_rate 0.0: ATESD (sound credit)"),
        (["train.method=grpo"], "exposure: none, as grpo has no teacher"),
        ([], "loss: forward_kl, not clipped, sequence mean, temperature 1, gate none"),
        (
            ["loss.divergence=top_k", "loss.divergence.k=5", "loss.clip=per_token", "sampling.temperature=0.5"],
            "loss: top_k (k 5), clip per_token at 2 nats, sequence mean, temperature 0.5, gate none",
        ),
        (
            ["loss.gate={kind: entropy, share: 0.25, side: low}"],
            "loss: forward_kl, not clipped, sequence mean, temperature 1, gate entropy (share 0.25, side low)",
        ),
        (["train.method=sft"], "loss: likelihood of the references, sequence mean"),
        ([], "teacher: frozen"),
        (["teacher.weights=ema", "teacher.decay=0.98"], "teacher: ema (decay 0.98)"),
        (["train.method=sft"], "teacher: none (sft)"),
        ([], "learning rate: 0.0005, constant"),
        (
            ["train.warmup_updates=3", "train.learning_rate_schedule=cosine"],
            "learning rate: 0.0005, after 3 updates of warm-up, cosine",
        ),
        (["train.seed=7"], "seed: 7"),
    ],
)
def test_what_will_act_is_a_line_of_the_dry_run(overrides: list[str], said: str):
    assert said in list(acting_lines(load_config("micro", overrides)))


@pytest.mark.parametrize(
    "overrides", [["credit.preset=paper"], ["credit.probe_every=2"], ["exposure.kind=full"], ["train.method=sft"]]
)
def test_a_discount_that_acts_or_that_nobody_reads_is_not_spoken_of(overrides: list[str]):
    assert not any("gamma" in line for line in acting_lines(load_config("micro", overrides)))


def test_a_budget_that_cannot_teach_the_policy_is_told_with_one_that_can():
    said = budget_line(load_config("micro"))
    assert said.startswith("too few to teach the policy anything: even a reward without any noise would take the mean")
    needed = int(said.partition("train.num_updates: ")[2].partition(" would do")[0])
    assert "too few" not in budget_line(load_config("micro", [f"train.num_updates={needed}"]))
    assert "no number of updates would do" in budget_line(load_config("micro", ["exposure.policy.learning_rate=0"]))


@pytest.mark.parametrize(
    "overrides", [["loss.divergence=sampled_token"], ["loss.divergence=reverse_kl", "sampling.top_p=0.9"]]
)
def test_an_unbiased_loss_is_not_spoken_of(overrides: list[str]):
    assert not any("biased" in line for line in acting_lines(load_config("micro", overrides)))
