"""A configuration for every row of the table of methods, and a batch that tells them apart."""

from mhr_scale.adapters import AdapterConfig

TASK_IDS = (2, 0, 2, 1, 0)
SEEDS = (11, 12, 13, 14, 15)

CONFIGS = {
    "LoRA": AdapterConfig(n_skills=1, rank=2),
    "(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=1),
    "Poly": AdapterConfig(n_skills=3, rank=2),
    "MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2),
    "Poly-(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=3),
    "MHR-(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4),
    "straight-through": AdapterConfig(n_skills=3, n_splits=4, policy="straight_through"),
    "noisy": AdapterConfig(n_skills=3, n_splits=4, policy="noisy"),
    # 1 / 4 is exact, whatever precision the mean is taken in
    "Random": AdapterConfig(n_skills=4, rank=2, policy="random"),
    "uniform": AdapterConfig(n_skills=4, rank=2, policy="uniform"),
    "fixed": AdapterConfig(n_skills=3, n_splits=4, policy="fixed"),
    "private": AdapterConfig(n_skills=1, rank=2, private=True),
    "private MHR": AdapterConfig(n_skills=3, n_splits=2, rank=2, private=True),
    "private (IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=1, private=True),
}
