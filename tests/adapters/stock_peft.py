"""What stock PEFT loads, computes and saves, beside the native logits of the same batch."""

import warnings

import torch
from peft import PeftModel, PolyConfig, get_peft_model
from peft_folders import OTHERS
from tiny import attach_copy, logits, make_batch, make_t5

TASK_IDS = (2, 0, 2, 1, 3, 3)


def assert_close(found, expected, relative):
    """Equal to so much of the largest number."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * largest)


def native_logits(adapter, dtype=torch.float32, **backbone):
    model = make_t5(**backbone).to(dtype).eval()
    ids = TASK_IDS if adapter.config.is_routed else [0] * len(TASK_IDS)
    return logits(model, attach_copy(model, adapter.to(dtype)), ids)


def stock_logits(model, dtype=torch.float32, *, is_routed):
    """Logits of a PEFT model in evaluation mode."""
    extra = {"task_ids": torch.tensor(TASK_IDS)} if is_routed else {}
    with torch.no_grad():
        return model.to(dtype).eval()(**make_batch(len(TASK_IDS)), **extra).logits


def load_stock(folder, **backbone):
    """What stock PEFT loads; any warning about the adapter is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in OTHERS:
            warnings.filterwarnings("ignore", message=message)
        return PeftModel.from_pretrained(make_t5(**backbone), folder)


def make_stock(config, folder, **backbone):
    """A folder that stock PEFT saved, and the logits of its model; no tensor is trivial."""
    model = get_peft_model(make_t5(**backbone), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "poly_")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(1.0 + 0.3 * noise if "ia3_" in name else 0.3 * noise)
    expected = stock_logits(model, is_routed=isinstance(config, PolyConfig))
    model.save_pretrained(folder)
    return expected
