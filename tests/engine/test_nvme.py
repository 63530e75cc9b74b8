"""Shards on NVMe are filled before they are written; a file that cannot be followed is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_t5 import CARD, small_t5, tensors_of
from torch import Tensor, nn

from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.engine import nvme
from mhr_scale.engine.filling import fill
from mhr_scale.errors import EngineError

FIELDS = {name: value for name, value in CARD.items() if name != "model_type"}
BLUEPRINT = read_blueprint(BackboneConfig(config=FIELDS))
TENSORS = tensors_of(small_t5(), aliases=False)
#: Elements of the smallest shard that goes to NVMe.
SWAPPED = 100


class Source:
    """Tensors in memory."""

    def names(self) -> frozenset[str]:
        return frozenset(TENSORS)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(TENSORS[name].shape)

    def file(self, name: str) -> Path | None:
        return None

    def view(self, name: str) -> Tensor | None:
        return None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return TENSORS[name].flatten()[start:stop]


class Swapper:
    """Keeps shards as DeepSpeed's swapper does, of two buffers, in a dictionary of files."""

    def __init__(self) -> None:
        self.files: dict[int, Tensor] = {}
        self.lent: dict[int, Tensor] = {}

    def get_buffer(self, parameter: Any, numel: int) -> Tensor:
        assert len(self.lent) < 2
        self.lent[parameter.ds_id] = torch.full((numel,), 7.0)  # what another shard left there
        return self.lent[parameter.ds_id]

    def swap_out_and_release(self, parameters: list[Any]) -> None:
        for parameter in parameters:
            self.files[parameter.ds_id] = self.lent.pop(parameter.ds_id).clone()
            parameter.ds_tensor.data = torch.tensor(1).half()


def sharded(n_ranks: int) -> tuple[nn.Module, Swapper]:
    """A model as `zero.Init` leaves it: large shards on NVMe, the others in memory."""
    with torch.device("meta"):
        model = make_model(BLUEPRINT)
    swapper = Swapper()
    for number, parameter in enumerate(model.parameters()):
        whole: Any = parameter
        held = -(-parameter.numel() // n_ranks)
        is_swapped = held >= SWAPPED
        whole.ds_id, whole.ds_numel, whole.ds_shape = number, parameter.numel(), parameter.shape
        whole.nvme_swapper = swapper
        whole.ds_tensor = torch.tensor(1).half() if is_swapped else torch.full((held,), 7.0)
        whole.ds_tensor.ds_numel = held
        whole.ds_tensor.final_location = "nvme" if is_swapped else None
    return model, swapper


def fill_shards(model: nn.Module, *, rank: int) -> None:
    blueprint = replace(BLUEPRINT, source=Source())
    fill(model, blueprint, kind="none", rank=rank, device=torch.device("cpu"))


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_shards_on_nvme_hold_what_was_read(n_ranks: int) -> None:
    parts: dict[str, list[Tensor]] = {name: [] for name in TENSORS}
    for rank in range(n_ranks):
        model, swapper = sharded(n_ranks)
        fill_shards(model, rank=rank)
        assert swapper.files
        for name, parameter in model.named_parameters():
            whole: Any = parameter
            parts[name].append(swapper.files.get(whole.ds_id, whole.ds_tensor))
    for name, tensor in TENSORS.items():
        flat = torch.cat(parts[name])
        assert torch.equal(flat[: tensor.numel()], tensor.flatten()), name
        assert not flat[tensor.numel() :].any()


def test_no_buffer_and_no_memory_stays_with_a_shard_on_nvme() -> None:
    model, swapper = sharded(1)
    fill_shards(model, rank=0)
    shards: list[Any] = [parameter.ds_tensor for parameter in model.parameters()]  # type: ignore[attr-defined]
    assert not swapper.lent
    assert {shard.numel() for shard in shards if shard.final_location == "nvme"} == {1}


# -- at the door -----------------------------------------------------------------------------------


class Op:
    """DeepSpeed's builder of the operation, with libaio or without."""

    def __init__(self, *, is_here: bool) -> None:
        self.is_here = is_here

    def is_compatible(self) -> bool:
        return self.is_here


def content(path: Path, **changes: Any) -> dict[str, Any]:
    offload = {"device": "nvme", "nvme_path": str(path), "buffer_size": 10**6, **changes}
    return {"zero_optimization": {"stage3_prefetch_bucket_size": 0, "offload_param": offload}}


def refusal(given: dict[str, Any], *, is_here: bool = True, n_ranks: int = 1) -> str:
    with pytest.raises(EngineError) as caught:
        nvme.check(given, BLUEPRINT, n_ranks=n_ranks, op=Op(is_here=is_here))
    return str(caught.value)


def test_without_libaio_the_refusal_says_what_to_install(tmp_path: Path) -> None:
    message = refusal(content(tmp_path), is_here=False)
    assert "offload_param.device: nvme needs libaio" in message
    assert "install libaio-dev" in message


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    message = refusal(content(tmp_path / "missing"))
    assert "offload_param.nvme_path: " in message
    assert "missing' is no folder to write to" in message
    assert "nvme_path: None is no folder" in refusal(content(tmp_path, nvme_path=None))


def test_buffers_smaller_than_the_largest_shard_are_refused(tmp_path: Path) -> None:
    largest = max(tensor.numel() for tensor in TENSORS.values())
    small = content(tmp_path, buffer_size=largest - 1)
    assert f"on 1 rank(s) has {largest}; set it to that or more" in refusal(small)
    assert nvme.check(small, BLUEPRINT, n_ranks=2, op=Op(is_here=True))


@pytest.mark.parametrize("zero", [{"stage3_prefetch_bucket_size": 5000}, {}])
def test_prefetching_is_refused(tmp_path: Path, zero: dict[str, Any]) -> None:
    given = content(tmp_path)
    given["zero_optimization"] = {
        "offload_param": given["zero_optimization"]["offload_param"],
        **zero,
    }
    assert "stage3_prefetch_bucket_size: 50" in refusal(given)


@pytest.mark.parametrize("zero", [{}, {"offload_param": {"device": "cpu"}}])
def test_other_files_ask_nothing_of_the_machine(zero: dict[str, Any]) -> None:
    assert not nvme.check({"zero_optimization": zero}, BLUEPRINT, n_ranks=1, op=Op(is_here=False))
