"""The verb `export` on adapters that stock PEFT has written."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from toy_exports import BASE, run_export, toy_t5

from mhr_scale.adapters import artefact

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",
    "ignore:.torch.jit.script_method. is deprecated",
)
#: PEFT's own defaults for T5 and forms that none of our layouts has as they are.
STOCK = {
    "LoRA": LoraConfig(task_type="SEQ_2_SEQ_LM", r=2),
    "LoRA of ranks": LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, rank_pattern={"v": 3}, layers_to_transform=[1]
    ),
    "IA3": IA3Config(task_type="SEQ_2_SEQ_LM"),
}


@pytest.mark.parametrize("kind", STOCK)
def test_an_adapter_of_stock_peft_comes_in_with_the_logits_it_has_there(
    kind: str, tmp_path: Path
) -> None:
    model = get_peft_model(deepcopy(toy_t5()), STOCK[kind])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(1.0 + noise if "ia3_" in name else noise)
    model.peft_config["default"].base_model_name_or_path = str(BASE)
    model.save_pretrained(tmp_path / "stock")
    folder = run_export(str(tmp_path / "stock"), tmp_path / "native", format="native")
    assert artefact.read_card(folder).backbone["name"] == str(BASE)
