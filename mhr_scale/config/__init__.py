"""What a recipe may say: one frozen dataclass per question, plain Python, no dependency.

Parts answer *what is the model* (`BackboneConfig`, `AdapterConfig`), *what is the data* (a tasks
part per suite, `MixtureConfig`), *how do we train* (`LossConfig`, `OptimConfig`, `ScheduleConfig`,
`BatchConfig`) and *where do we write* (`RunConfig`). Derived numbers are methods, never fields.
`recipe.py` reads them from YAML. The text under a field is its help text.
"""

from mhr_scale.config.adaptation import (
    AdaptConfig,
    AdaptRunConfig,
    ProtocolConfig,
    SelectionConfig,
    ShotsConfig,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.config.analyse import AlignmentConfig, AnalyseConfig, MonitorConfig
from mhr_scale.config.convert import ConvertConfig, FingerprintConfig, OriginConfig
from mhr_scale.config.data import (
    EvalTasksConfig,
    HeldOutTasks,
    IntakeConfig,
    JsonlTasks,
    MixtureConfig,
    SuperNITasks,
    T0Tasks,
    TasksConfig,
    ToyTasks,
)
from mhr_scale.config.export import ExportConfig
from mhr_scale.config.finetune import (
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    FinetuneShotsConfig,
)
from mhr_scale.config.model import AdapterConfig, BackboneConfig, Policy, SoupConfig
from mhr_scale.config.plan import HardwareConfig, PlanConfig, WorkloadConfig
from mhr_scale.config.training import (
    BatchConfig,
    LossConfig,
    OptimConfig,
    PlainRunConfig,
    RunConfig,
    ScheduleConfig,
)
from mhr_scale.config.verbs import (
    AverageConfig,
    EvaluateConfig,
    PretrainConfig,
    ScoringConfig,
)

__all__ = [
    "AdaptConfig",
    "AdaptRunConfig",
    "AdapterConfig",
    "AlignmentConfig",
    "AnalyseConfig",
    "AverageConfig",
    "BackboneConfig",
    "BatchConfig",
    "ConvertConfig",
    "EvalTasksConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "FinetuneOptimConfig",
    "FinetuneRunConfig",
    "FinetuneShotsConfig",
    "FingerprintConfig",
    "HardwareConfig",
    "HeldOutTasks",
    "IntakeConfig",
    "JsonlTasks",
    "LossConfig",
    "MixtureConfig",
    "MonitorConfig",
    "OptimConfig",
    "OriginConfig",
    "PlainRunConfig",
    "PlanConfig",
    "Policy",
    "PretrainConfig",
    "ProtocolConfig",
    "RunConfig",
    "ScheduleConfig",
    "ScoringConfig",
    "SelectionConfig",
    "ShotsConfig",
    "SoupConfig",
    "SuperNITasks",
    "T0Tasks",
    "TasksConfig",
    "ToyTasks",
    "VariantConfig",
    "WavesConfig",
    "WorkloadConfig",
]
