"""A method in words, the same in every table and card. Imports no torch: the report reads it."""

from __future__ import annotations

from atesd.config.settings import (
    AlignedGateSettings,
    Config,
    CorrectGateSettings,
    InfluenceGateSettings,
    NoGate,
    PermutableGate,
    RandomGateSettings,
    RankedGateSettings,
    SdarGateSettings,
    SoftGateSettings,
)


def method_name(config: Config) -> str:
    """What was trained, in the words of the papers: OPSD, ATESD, a fixed ratio, a baseline or a control."""
    by_level = config.train.has_policy_gradient and config.train.baseline == "difficulty"
    gradient = "REINFORCE with a baseline per difficulty" if by_level else "GRPO"
    hinted = [f"{config.hinted.rollouts} of {config.train.batch_size} rollouts hinted"] * (config.hinted.rollouts > 0)
    if not config.distils:
        return ", ".join([gradient if config.train.has_policy_gradient else config.train.method.upper(), *hinted])
    exposure = config.exposure
    extras = [f"control: {exposure.reference_ablation}"] if exposure.reference_ablation != "off" else []
    if config.train.grpo_weight:
        extras.append(f"plus {config.train.grpo_weight:g} x {gradient}")
    if not isinstance(config.loss.gate, NoGate):
        permuted = isinstance(config.loss.gate, PermutableGate) and config.loss.gate.permute
        extras.append(_gate(config) + ", permuted" * permuted)
    extras += ["shuffled rewards"] if config.decides and config.credit.shuffle_rewards else []
    return ", ".join([exposure.label(config.credit), *extras, *hinted])


def _gate(config: Config) -> str:
    match config.loss.gate:
        case AlignedGateSettings(skip=skip):
            return f"aligned tokens ({config.alignment.success})" + _skipped(skip)
        case SoftGateSettings(sharpness=sharpness, skip=skip):
            return f"tokens weighed by alignment ({config.alignment.success}, sharpness {sharpness:g})" + _skipped(skip)
        case SdarGateSettings(beta=beta):
            return f"tokens weighed by the teacher's gap (SDAR, beta {beta:g})"
        case InfluenceGateSettings():
            return "tokens weighed by influence on the policy gradient (after ICSD)"
        case CorrectGateSettings():
            return "verified rollouts only"
        case RandomGateSettings(share=share):
            return f"{share:.0%} of the tokens, at random"
        case RankedGateSettings(share=share, side=side) as gate:
            most = {"high": "largest", "low": "smallest"}[side]
            by = {"disagreement": "KL", "entropy": "entropy"}[gate.kind]
            return f"the {share:.0%} of the tokens with the {most} {by}"
        case _:
            return "every token"


def _skipped(skip: str) -> str:
    return "" if skip == "none" else f", misaligned {skip} skipped"
