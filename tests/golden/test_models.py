"""A tiny T5 v1.1 with adapters against the reference: logits, gradients, a whole training run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_models import after_training, before_training, errors
from golden_vectors import read
from torch import Tensor


@pytest.fixture(scope="module")
def golden(model_file: Path) -> SimpleNamespace:
    return read(model_file)


@pytest.fixture(scope="module")
def before(golden: SimpleNamespace) -> SimpleNamespace:
    return before_training(golden)


@pytest.fixture(scope="module")
def after(golden: SimpleNamespace) -> SimpleNamespace:
    return after_training(golden)


def faults(found: dict[str, Tensor], golden: SimpleNamespace, prefix: str) -> dict[str, float]:
    return {name: e for name, e in errors(found, golden, prefix).items() if e >= 1e-5}


def test_logits_and_loss_equal_the_reference(
    before: SimpleNamespace, golden: SimpleNamespace
) -> None:
    assert faults(before.eval, golden, "eval") == {}


def test_gradients_equal_the_reference(before: SimpleNamespace, golden: SimpleNamespace) -> None:
    assert faults(before.gradients, golden, "grad") == {}


def test_loss_and_gradient_norm_curves_equal_the_reference(
    after: SimpleNamespace, golden: SimpleNamespace
) -> None:
    assert faults(after.curves, golden, "train") == {}


def test_final_parameters_equal_the_reference(
    after: SimpleNamespace, golden: SimpleNamespace
) -> None:
    assert faults(after.parameters, golden, "final") == {}


def test_final_logits_equal_the_reference(after: SimpleNamespace, golden: SimpleNamespace) -> None:
    assert faults(after.final, golden, "final_eval") == {}


def test_average_equals_the_reference(after: SimpleNamespace, golden: SimpleNamespace) -> None:
    assert faults(after.average, golden, "average_eval") == {}
