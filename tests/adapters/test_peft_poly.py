"""PEFT's Poly with the same tensors as a second oracle: its scale is 1 / rank, as alpha = 1."""

import pytest
import torch
from peft import PolyConfig, TaskType, get_peft_model
from tiny import TASKS, make_adapted, make_batch, make_t5

from mhr_scale.adapters import AdapterConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",
    "ignore:.torch.jit.script_method. is deprecated",
)

TASK_IDS = (2, 0, 2, 1, 3, 3)
MHR = AdapterConfig(n_skills=3, n_splits=4, rank=2, alpha=1.0)
POLY = AdapterConfig(n_skills=3, n_splits=1, rank=2, alpha=1.0)


def make_peft(adapter):
    """PEFT's model with the adapter's tensors, in evaluation mode (it always draws in training)."""
    config = adapter.config
    model = get_peft_model(
        make_t5(),
        PolyConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            r=config.rank,
            n_tasks=len(TASKS),
            n_skills=config.n_skills,
            n_splits=config.n_splits,
            target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        ),
    )
    inventory = adapter.inventory
    for stack in inventory.stacks:
        for row, member in enumerate(stack.members):
            name = adapter.sites[member].name
            layer = model.base_model.model.get_submodule(name)
            table = adapter.routing_logits.data[:, adapter.groups.index(name)]
            layer.poly_lora_A["default"].data.copy_(inventory.stacked(stack, "A").data[row])
            layer.poly_lora_B["default"].data.copy_(inventory.stacked(stack, "B").data[row])
            layer.poly_router["default"].module_logits.data.copy_(table.flatten(1))
    return model.eval()


@pytest.mark.parametrize("config", [POLY, MHR], ids=["Poly", "MHR"])
def test_logits_equal_those_of_peft(config):
    model, adapter = make_adapted(config, dtype=torch.float32)
    model.eval()
    batch = make_batch(len(TASK_IDS))
    with torch.no_grad(), adapter.slots(TASK_IDS):
        ours = model(**batch).logits
    with torch.no_grad():
        theirs = make_peft(adapter)(**batch, task_ids=torch.tensor(TASK_IDS)).logits
    largest = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest)


def test_the_adapter_matters_to_the_logits_compared():
    _, adapter = make_adapted(MHR, dtype=torch.float32)
    batch = make_batch(len(TASK_IDS))
    with torch.no_grad():
        theirs = make_peft(adapter)(**batch, task_ids=torch.tensor(TASK_IDS)).logits
        bare = make_t5().eval()(**batch).logits
    assert (theirs - bare).abs().max() > 0.1 * theirs.abs().max()
