"""Packages that only some want: each belongs to an extra of this package, and is asked for by name.

What the system is made of (deepspeed, transformers, peft, ...) is no extra: it is always installed.
"""

import importlib.util

from mhr_scale.errors import ConfigError

#: The extra that installs a module, as `[project.optional-dependencies]` has it.
EXTRAS = {
    "tensorboard": "trackers",
    "wandb": "trackers",
    "trackio": "trackers",
    "mlflow": "trackers",
    "sqlalchemy": "trackers",
    "alembic": "trackers",
    "lm_eval": "lm-eval",
}


def check(module: str, *, what: str, way_out: str = "") -> None:
    """Raise `ConfigError` if a module of an extra is not installed; `what` asked for it.

    `way_out` is another than to install it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a mere folder of that name has no origin
        raise ConfigError(
            f"{what}: '{module}' is not installed; "
            f'pip install "mhr_scale[{EXTRAS[module]}]"{way_out}'
        )
