"""The adapter: all trainable tensors of a run, and the methods that fill slots from them.

Shape letters: B batch rows, U slots, T tasks, G routing groups, Q splits, S skills.

| method | slots of a batch | filled from |
|---|---|---|
| LoRA, (IA)3 | 1 | the only skill |
| Poly, MHR | the distinct tasks | inventory mixed by the task's routing row, split by split |
| noisy routing | the rows | the same, with noise drawn for each row |
| Random | the rows while training, then 1 | inventory mixed by a random mask, then the mean |
| uniform | 1 | mean of the inventory |
| private | the distinct tasks | an inventory per task, mixed as above |
| Arrow | 1 | the LoRAs of all tasks side by side, which each token weighs |
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhr_scale.adapters import routing
from mhr_scale.adapters.arrow import Arrow
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.inventory import Inventory, Stack
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.adapters.policies import POLICIES
from mhr_scale.adapters.row_map import RowMap
from mhr_scale.adapters.sites import Site, check_splits, find_sites
from mhr_scale.adapters.slots import Slots, Users, find_users, mix_pairs, mix_vectors
from mhr_scale.adapters.wrapping import AdaptedModel, check_bare, wrap
from mhr_scale.errors import AdapterError, suggest
from mhr_scale.families.sending import send_numbers
from mhr_scale.families.sequences import Stream
from mhr_scale.seeds import seed_from


class Adapter(nn.Module):
    """Inventory and routing of one backbone: float32, replicated on every rank, never sharded.

    Made by `attach`. `parameters()` are the trainable tensors; the backbone is not among them.
    With `row_gradients` those of routing logits are sparse over tasks. In a wave (`is_wave`) the
    tasks are independent jobs, and a slot's numbers do not depend, to the bit, on the other slots:
    rank 1 is padded to 2 (a product of one column uses another kernel if there is one slot only),
    and routing is computed slot by slot.
    """

    def __init__(
        self,
        config: AdapterConfig,
        sites: tuple[Site, ...],
        *,
        task_names: Sequence[str],
        seed: int = 0,
        row_gradients: bool = False,
        is_wave: bool = False,
    ) -> None:
        super().__init__()
        duplicates = sorted({name for name in task_names if list(task_names).count(name) > 1})
        if duplicates or not task_names:
            raise AdapterError(f"task names must be unique and at least one; twice: {duplicates}")
        check_splits(sites, n_splits=config.n_splits, kind=config.kind)
        self.config = config
        self.policy = POLICIES[config.policy]
        self.sites = sites
        self.task_names = tuple(task_names)
        self.row_gradients = row_gradients
        #: Tasks of the rows that a sparse gradient of routing has: the host never asks the device.
        self.gradient_tasks: tuple[int, ...] = ()
        self.is_wave = is_wave
        #: How tokens choose among the tasks' LoRAs (`library.route_by_token`), if they do.
        self.by_token: Arrow | None = None
        self.linears: list[AdaptedLinear] = []
        self._adapted: AdaptedModel | None = None
        self._users: Users | None = None
        self.inventory = Inventory(config, sites, n_tasks=len(task_names), seed=seed)
        groups = [site.routing_group(config.granularity, config.block_span) for site in sites]
        self.groups = tuple(dict.fromkeys(groups))
        for stack in self.inventory.stacks:
            index = torch.tensor([self.groups.index(groups[m]) for m in stack.members])
            self.register_buffer(f"groups_{stack.key}", index, persistent=False)
        self.routing_logits: nn.Parameter | None = None
        if config.has_logits:
            shape = (len(self.task_names), len(self.groups), config.n_splits, config.n_skills)
            generator = torch.Generator().manual_seed(seed_from("routing", seed))
            logits_TGQS = routing.init_logits(shape, generator=generator)
            self.routing_logits = nn.Parameter(logits_TGQS, self.policy.trains_logits)

    # -- slots ---------------------------------------------------------------------------------

    def slots(
        self,
        task_ids: Sequence[int | str] | Tensor,
        *,
        rows_per_example: int = 1,
        tokens: Sequence[Stream] = (),
        seeds: Sequence[int] | None = None,
        uniform_share: float = 0.0,
    ) -> Slots:
        """Fill the slots of one step: `with adapter.slots(task_ids) as slots: ...`.

        `task_ids` holds one task number or name per example, on the host; a single one stands for
        all rows. A pass of the model has one row per example, or `rows_per_example` consecutive
        ones (beams, answer choices). With `tokens` it has all examples in one sequence, one behind
        another: the tokens of each, for every sequence that it computes. `seeds`, one integer per
        example, feeds policies that draw numbers while the model trains; by default they come from
        torch's global generator. `uniform_share` moves every mixing weight that far towards 1 / S
        (annealing, docs/method.md 9). Raises `AdapterError` for unknown tasks or ids on a device.
        """
        ids = self.check_task_ids(task_ids)
        seeds = self._row_seeds(len(ids), seeds)
        config = self.config
        per_row = seeds is not None and config.is_routed and self.policy.draws
        by_task = config.has_logits or config.private or per_row
        distinct = tuple(dict.fromkeys(ids))
        if self.by_token is not None or not by_task:
            slot_of_row = (0,) * len(ids)
        elif per_row:
            slot_of_row = tuple(range(len(ids)))
        else:
            slot_of_row = tuple(distinct.index(task) for task in ids)
        rows = RowMap(
            slot_of_row=slot_of_row,
            n_slots=max(slot_of_row) + 1,
            rows_per_example=rows_per_example,
            streams=_check_streams(tokens, len(ids)),
            is_exact=self.is_wave,
        )
        if self.by_token is not None:
            mix = partial(self.mix, None, tuple(range(len(self.task_names))))
            return self.by_token.slots(self.users(), rows, dtype=self.compute_dtype(), mix=mix)
        leaf = None
        dtype, device = self.compute_dtype(), next(self.inventory.parameters()).device
        with torch.autocast(device.type, enabled=False):
            weights_UGQS = None
            if config.is_routed:
                weights_UGQS, leaf = self._weights(ids, distinct, seeds)
                if uniform_share:
                    mean = uniform_share / config.n_skills
                    weights_UGQS = (1.0 - uniform_share) * weights_UGQS + mean
            mixed = self.mix(weights_UGQS, ids if per_row else distinct)
            if not (rows.streams or rows.is_even):
                # before they are rounded: the gradients of a slot's rows are summed as they are
                index = send_numbers(slot_of_row, device)
                mixed = [tuple(side.index_select(1, index) for side in sides) for sides in mixed]
            if config.kind == "lora":
                mixed = [tuple(side.to(dtype) for side in sides) for sides in mixed]
            if self.is_wave and config.kind == "lora" and config.rank == 1:
                mixed = [(F.pad(a, (0, 1)), F.pad(b, (0, 0, 0, 1))) for a, b in mixed]
        return Slots(
            self.users(),
            rows,
            mixed,
            kind=config.kind,
            routing=None if leaf is None else (leaf, partial(self.add_routing_gradient, distinct)),
        )

    def mix(
        self, weights_UGQS: Tensor | None, tasks: tuple[int, ...] = ()
    ) -> list[tuple[Tensor, ...]]:
        """Mix all linears for U slots, one batched product per shape and side.

        `tasks` are the slots' tasks, read where inventories are private. Without weights a slot is
        the only skill. In a wave, slots that share an inventory are mixed one by one.
        """
        config = self.config
        is_apart = self.is_wave and not config.private
        if is_apart and weights_UGQS is not None and len(weights_UGQS) > 1:
            singles = [self.mix(weights_1GQS) for weights_1GQS in weights_UGQS.split(1)]
            return [
                tuple(torch.cat(side, 1) for side in zip(*stacks, strict=True))
                for stacks in zip(*singles, strict=True)
            ]
        mixed: list[tuple[Tensor, ...]] = []
        index = None
        if config.private and tasks != tuple(range(len(self.task_names))):
            index = send_numbers(tasks, next(self.inventory.parameters()).device)
        for stack in self.inventory.stacks:
            w_UNQS = None
            if weights_UGQS is not None:
                w_UNQS = weights_UGQS.index_select(1, self.get_buffer(f"groups_{stack.key}"))
            if config.kind == "ia3":
                mixed.append((mix_vectors(self._inventories(stack, "l", index), w_UNQS),))
            else:
                a_NKQSIR, b_NKQSRO = (self._inventories(stack, side, index) for side in "AB")
                mixed.append(mix_pairs(a_NKQSIR, b_NKQSRO, w_UNQS, scale=config.scale))
        return mixed

    def _inventories(self, stack: Stack, side: str, index: Tensor | None) -> Tensor:
        """The stacked tensor as (N, K, Q, S, ...): K = 1 if shared, else one per slot.

        `index` are the slots' tasks where those are not all, in order.
        """
        tensor = self.inventory.stacked(stack, side)
        if not self.config.private:
            return tensor.unsqueeze(1)
        return tensor if index is None else tensor.index_select(1, index)

    def _weights(
        self, ids: tuple[int, ...], distinct: tuple[int, ...], seeds: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixing weights (U, G, Q, S) of the slots, and the leaf of the routing rows they read."""
        config = self.config
        shape_GQS = (len(self.groups), config.n_splits, config.n_skills)
        like = next(self.inventory.parameters())
        device = like.device
        draws = self.policy.draws and seeds is not None
        if self.routing_logits is None:
            n_slots = len(ids) if draws else len(distinct) if config.private else 1
            zeros_UGQS = like.new_zeros((n_slots, *shape_GQS))
            return routing.mixing_weights(zeros_UGQS, config.routing, seeds=seeds), None
        rows = send_numbers(distinct, device)
        leaf = self.routing_logits.detach().index_select(0, rows)
        leaf.requires_grad_(self.routing_logits.requires_grad and torch.is_grad_enabled())
        logits_UGQS = leaf
        if draws:
            positions = send_numbers([distinct.index(task) for task in ids], device)
            logits_UGQS = leaf.index_select(0, positions)
        if self.is_wave:  # the last elements of a vectorised sigmoid round differently
            singles = logits_UGQS.split(1)
            slot_seeds = [None] * len(singles) if seeds is None else [[seed] for seed in seeds]
            weights = [
                routing.mixing_weights(logits_1GQS, config.routing, seeds=slot_seed)
                for logits_1GQS, slot_seed in zip(singles, slot_seeds, strict=False)
            ]
            return torch.cat(weights), leaf
        return routing.mixing_weights(logits_UGQS, config.routing, seeds=seeds), leaf

    def _row_seeds(self, n_rows: int, seeds: Sequence[int] | None) -> Sequence[int] | None:
        """The rows' seeds while the model trains, None while it evaluates."""
        if self._adapted is not None and not self._adapted.training:
            return None
        if seeds is None:
            return torch.randint(2**62, (n_rows,)).tolist()
        if len(seeds) != n_rows:
            raise AdapterError(f"{len(seeds)} seeds for {n_rows} examples; give one per example")
        return seeds

    def add_routing_gradient(self, task_ids: tuple[int, ...], gradient_UGQS: Tensor) -> None:
        """Accumulate the gradient of some distinct routing rows, dense unless `row_gradients`."""
        logits = self.routing_logits
        assert logits is not None
        if self.row_gradients:
            before = () if logits.grad is None else self.gradient_tasks
            tasks = tuple(sorted({*before, *task_ids}))
            rows = self.gradient_rows(tasks)
            rows.index_add_(0, self._places(task_ids, tasks), gradient_UGQS)
            self.set_gradient_rows(tasks, rows)
            return
        if logits.grad is None:
            logits.grad = torch.zeros_like(logits)
        logits.grad.index_add_(0, send_numbers(task_ids, logits.device), gradient_UGQS)

    def gradient_rows(self, tasks: Sequence[int]) -> Tensor:
        """A copy of the sparse gradient's rows of some tasks, zeros where it has none."""
        logits = self.routing_logits
        assert logits is not None
        rows = logits.new_zeros(len(tasks), *logits.shape[1:])
        if logits.grad is not None:
            places = self._places(self.gradient_tasks, tasks)
            rows.index_copy_(0, places, logits.grad.values())
        return rows

    def set_gradient_rows(self, tasks: Sequence[int], rows: Tensor) -> None:
        """Make the sparse gradient of routing one of the rows of these tasks, ascending."""
        logits = self.routing_logits
        assert logits is not None
        self.gradient_tasks = tuple(tasks)
        index = send_numbers(tasks, rows.device)[None]
        logits.grad = torch.sparse_coo_tensor(
            index, rows, logits.shape, is_coalesced=True, check_invariants=False
        )

    def _places(self, some: Sequence[int], tasks: Sequence[int]) -> Tensor:
        """Where some of the tasks stand among them."""
        place_of = {task: place for place, task in enumerate(tasks)}
        device = next(self.inventory.parameters()).device
        return send_numbers([place_of[task] for task in some], device)

    # -- the model it is attached to -----------------------------------------------------------

    def compute_dtype(self) -> torch.dtype:
        """Data type of the frozen product: autocast's where it is on, else the weights'."""
        device = self.linears[0].weight.device.type if self.linears else "cpu"
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.linears[0].compute_dtype if self.linears else torch.float32

    def check_task_ids(self, task_ids: Sequence[int | str] | Tensor) -> tuple[int, ...]:
        """Task numbers of ids or names; raises `AdapterError` for any the adapter lacks."""
        if isinstance(task_ids, Tensor):
            if task_ids.device.type != "cpu":
                raise AdapterError(
                    f"task ids lie on {task_ids.device}: reading them would stall the device; "
                    "keep them on the host"
                )
            task_ids = task_ids.tolist()
        if len(task_ids) == 0:
            raise AdapterError("no task ids: give one per example")
        numbers = []
        for task in task_ids:
            if isinstance(task, str):
                if task not in self.task_names:
                    hint = suggest(task, self.task_names)
                    raise AdapterError(f"task '{task}' is not in this adapter{hint}")
                numbers.append(self.task_names.index(task))
            elif 0 <= task < len(self.task_names):
                numbers.append(int(task))
            else:
                raise AdapterError(f"task id {task} is not in 0..{len(self.task_names) - 1}")
        return tuple(numbers)

    def bind(self, adapted: AdaptedModel) -> None:
        """Attach to a wrapped model, in place of the adapter bound before.

        Wrapped linears that are not among this adapter's sites run bare. The adapter's tensors move
        to the linears' device.
        """
        self._adapted = adapted
        self.linears = [adapted[site.name] for site in self.sites]
        self._users = None
        names = {site.name for site in self.sites}
        for name, linear in adapted.items():
            linear.is_off = name not in names
        weight = self.linears[0].weight
        if weight.device.type != "meta":
            self.to(weight.device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Adapter":
        """Move the tensors; who uses them holds indices, which are made anew on their device."""
        self._users = None
        return super()._apply(fn, recurse)

    def release(self) -> None:
        """Detach from the model."""
        self._adapted, self.linears, self._users = None, [], None

    def users(self) -> Users:
        """The modules that use the slots of the linears.

        Raises `AdapterError` if the adapter is attached to no model.
        """
        if not self.linears or not self.linears[0].is_attached:
            raise AdapterError("this adapter sits in no model; make it with attach(model, ...)")
        if self._users is None:
            stacks = ([self.linears[m] for m in stack.members] for stack in self.inventory.stacks)
            self._users = find_users(list(stacks))
        return self._users

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the bare backbone inside the block."""
        for linear in self.linears:
            linear.is_off = True
        try:
            yield
        finally:
            for linear in self.linears:
                linear.is_off = False


def _check_streams(tokens: Sequence[Stream], n_examples: int) -> tuple[Stream, ...]:
    """Raise `AdapterError` for counts that are not those of the examples, or cannot be told."""
    for stream in tokens:
        if len(stream.counts) != n_examples or sum(stream.counts) > stream.n_tokens:
            raise AdapterError(
                f"tokens of {len(stream.counts)} examples, {sum(stream.counts)} of "
                f"{stream.n_tokens}, for {n_examples} task ids; give the tokens of each example"
            )
    lengths = [stream.n_tokens for stream in tokens]
    if len(set(lengths)) < len(lengths):
        raise AdapterError(
            f"sequences of {lengths} tokens cannot be told apart; make one of them longer"
        )
    return tuple(tokens)


def attach(
    model: nn.Module, config: AdapterConfig, *, tasks: Sequence[str], seed: int = 0
) -> Adapter:
    """Freeze `model`, wrap the linears of the layout in place, and return the new adapter.

    Raises `LayoutError` if the layout does not fit the model, `AdapterError` if it has adapters.
    """
    check_bare(model)
    sites = find_sites(model, config.layout, config.blocks)
    adapter = Adapter(config, sites, task_names=tasks, seed=seed)
    adapter.bind(wrap(model, sites))
    return adapter
