"""What a recipe may say: one frozen dataclass per question.

Parts answer *what is the model* (`BackboneConfig`, `AdapterConfig`), *what is the data* (a tasks
part per suite, `MixtureConfig`), *how do we train* (`LossConfig`, `OptimConfig`, `ScheduleConfig`,
`BatchConfig`) and *where do we write* (`RunConfig`). The parts of adapters and task suites are
defined beside the code that reads them. Derived numbers are methods, never fields.
`recipe.reading` reads parts from YAML. The text under a field is its help text.

Other rooms import the parts from here.
"""

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.config.adaptation import (
    AdaptConfig,
    AdaptRunConfig,
    ProtocolConfig,
    SelectionConfig,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.config.analyse import AlignmentConfig, AnalyseConfig, MonitorConfig
from mhr_scale.config.convert import ConvertConfig, FingerprintConfig, OriginConfig
from mhr_scale.config.export import ExportConfig
from mhr_scale.config.finetune import (
    FinetuneBackboneConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    FinetuneShotsConfig,
)
from mhr_scale.config.model import ArrowConfig, BackboneConfig, SoupConfig, precision_of
from mhr_scale.config.plan import HardwareConfig, PlanConfig, WorkloadConfig
from mhr_scale.config.training import (
    BatchConfig,
    Cut,
    LossConfig,
    OptimConfig,
    PlainRunConfig,
    RunConfig,
    ScheduleConfig,
)
from mhr_scale.config.verbs import AverageConfig, EvaluateConfig, PretrainConfig, ScoringConfig
from mhr_scale.tasks.crossfit.tasks import CrossFitTasks
from mhr_scale.tasks.jsonl import JsonlTasks
from mhr_scale.tasks.mixture import MixtureConfig
from mhr_scale.tasks.suite import ShotsConfig
from mhr_scale.tasks.suites import EvalTasksConfig, TasksConfig
from mhr_scale.tasks.superni import SuperNITasks
from mhr_scale.tasks.t0.held_out import HeldOutTasks
from mhr_scale.tasks.t0.mixtures import T0Tasks
from mhr_scale.tasks.task import IntakeConfig
from mhr_scale.tasks.toy import ToyTasks

__all__ = [
    "AdaptConfig",
    "AdaptRunConfig",
    "AdapterConfig",
    "AlignmentConfig",
    "AnalyseConfig",
    "ArrowConfig",
    "AverageConfig",
    "BackboneConfig",
    "BatchConfig",
    "ConvertConfig",
    "CrossFitTasks",
    "Cut",
    "EvalTasksConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneBackboneConfig",
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
    "precision_of",
]
