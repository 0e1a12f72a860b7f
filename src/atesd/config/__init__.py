"""Every setting of a run: load, override, check, explain, dump."""

from __future__ import annotations

from atesd.component import ActsWhen, Component, Fraction
from atesd.config.acting import Setting, acting_settings, describe_settings
from atesd.config.labels import method_name
from atesd.config.load import (
    config_from_mapping,
    dump_config,
    load_config,
    recipe_names,
    recipe_text,
    shared_overrides,
    with_groups,
    with_overrides,
)
from atesd.config.settings import (
    GENERATED,
    PROCEDURAL,
    AlignedGateSettings,
    AlignmentConfig,
    ColumnsConfig,
    Config,
    CorrectGateSettings,
    DataConfig,
    DisagreementGateSettings,
    EmaTeacher,
    EntropyGateSettings,
    EvaluationConfig,
    FrozenTeacher,
    LiveTeacher,
    LoraConfig,
    LossConfig,
    ModelConfig,
    NoGate,
    RandomGateSettings,
    RankedGateSettings,
    RefreshedTeacher,
    SamplingConfig,
    ServerSettings,
    SharesConfig,
    TeacherConfig,
    TrainConfig,
    ViewsConfig,
)
from atesd.config.yaml import parse_yaml, yaml_value
from atesd.control.aligned import AlignedSettings
from atesd.control.bandit import BanditSettings
from atesd.control.credit import CREDIT_PRESETS, CreditConfig, ProgressSignal
from atesd.control.custom import CustomSettings
from atesd.control.fixed import FixedSettings, FullSettings, RandomSettings, ReplaySettings, ScheduleSettings
from atesd.control.learned import LearnedSettings, PolicyConfig
from atesd.control.setpoint import SetpointSettings
from atesd.control.settings import ExposureSettings, Granularity
from atesd.control.staircase import StaircaseSettings

__all__ = [
    "CREDIT_PRESETS",
    "GENERATED",
    "PROCEDURAL",
    "ActsWhen",
    "AlignedGateSettings",
    "AlignedSettings",
    "AlignmentConfig",
    "BanditSettings",
    "ColumnsConfig",
    "Component",
    "Config",
    "CorrectGateSettings",
    "CreditConfig",
    "CustomSettings",
    "DataConfig",
    "DisagreementGateSettings",
    "EmaTeacher",
    "EntropyGateSettings",
    "EvaluationConfig",
    "ExposureSettings",
    "FixedSettings",
    "Fraction",
    "FrozenTeacher",
    "FullSettings",
    "Granularity",
    "LearnedSettings",
    "LiveTeacher",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "NoGate",
    "PolicyConfig",
    "ProgressSignal",
    "RandomGateSettings",
    "RandomSettings",
    "RankedGateSettings",
    "RefreshedTeacher",
    "ReplaySettings",
    "SamplingConfig",
    "ScheduleSettings",
    "ServerSettings",
    "SetpointSettings",
    "Setting",
    "SharesConfig",
    "StaircaseSettings",
    "TeacherConfig",
    "TrainConfig",
    "ViewsConfig",
    "acting_settings",
    "config_from_mapping",
    "describe_settings",
    "dump_config",
    "load_config",
    "method_name",
    "parse_yaml",
    "recipe_names",
    "recipe_text",
    "shared_overrides",
    "with_groups",
    "with_overrides",
    "yaml_value",
]
