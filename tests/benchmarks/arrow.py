"""A pass under Arrow beside one under the averaged adapter, of the same library of LoRAs.

python tests/benchmarks/arrow.py [--model llama] [--experts 100] [--rank 4] [--turns 9]
    forward passes without gradients over a decoder-only backbone of random weights

All ways share the weights of one backbone and take turns, in an order that is reversed every other
time. Times are medians over the turns, ratios medians over the ratios of a turn.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from step_time import one_pass, ratio
from step_time_causal import CAUSAL_SHAPES, build_causal, fuse_causal, pack
from step_time_ways import SWITCHES, Setting, Way

from mhr_scale.adapters import Adapter, AdapterConfig, attach
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.library import route_by_token
from mhr_scale.families.causal import CAUSAL


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Time every way, print what was found, and return ratios to the averaged adapter."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    setting = Setting(
        model=args.model,
        rows=args.rows,
        tokens=args.tokens,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
    )
    ways = [way for way in make_ways(setting, args.experts, args.rank, args.top_k)]
    for way in ways:
        way.step()
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    load = os.getloadavg()[0]
    for turn in range(args.turns):
        for way in ways[:: -1 if turn % 2 else 1]:
            times[way.name].append(one_pass(way, setting))
    print(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    found = {}
    for name, of_way in times.items():
        found[name] = ratio(of_way, times["average"], setting)
        cpu, wall = (1e3 * statistics.median(part) for part in zip(*of_way, strict=True))
        clock = statistics.median(
            own[1] / other[1] for own, other in zip(of_way, times["average"], strict=True)
        )
        print(
            f"| {name} | {cpu:.0f} ms of the process | {wall:.0f} ms of the clock | "
            f"{found[name]:.2f} | {clock:.2f} |"
        )
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=CAUSAL_SHAPES, default="llama", help="(llama)")
    add("--experts", type=int, default=100, help="LoRAs (100)")
    add("--rank", type=int, default=4, help="of each (4)")
    add("--top-k", type=int, default=4, help="LoRAs that a token takes (4)")
    add("--rows", type=int, default=8, help="rows of a pass (8)")
    add("--tokens", type=int, default=256, help="tokens of a prompt (256)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--threads", type=int, default=1, help="threads of one process (1)")
    add("--turns", type=int, default=9, help="turns (9)")
    return parser.parse_args(arguments)


@torch.no_grad()
def make_ways(setting: Setting, n_experts: int, rank: int, top_k: int) -> list[Way]:
    """The averaged adapter, Arrow, and the backbone alone."""
    model = build_causal(setting).eval()
    packed = pack(setting)
    config = AdapterConfig(n_skills=1, rank=rank, private=True)

    def fused() -> Any:
        return fuse_causal(model, *SWITCHES).eval()

    def run(one: Any, adapter: Adapter | None) -> Callable[[], torch.Tensor]:
        @torch.no_grad()
        def forward() -> torch.Tensor:
            if adapter is None:
                return CAUSAL.logits(one, packed)
            with adapter.slots([0] * setting.rows):
                return CAUSAL.logits(one, packed)

        return forward

    arrow_model, mean_model = fused(), fused()
    library = attach(arrow_model, config, tasks=[f"task {n}" for n in range(n_experts)])
    generator = torch.Generator().manual_seed(0)
    for parameter in library.inventory.parameters():
        parameter.normal_(std=0.02, generator=generator)
    mean = average(library)
    attached = attach(mean_model, mean.config, tasks=["average"])
    attached.load_state_dict(mean.state_dict())
    route_by_token(library, top_k=top_k)
    for adapter in (library, attached):
        adapter.to(setting.device).requires_grad_(False)
    ways = {
        "average": (mean_model, attached),
        "Arrow": (arrow_model, library),
        "backbone": (fused(), None),
    }
    return [
        Way(
            name=name,
            model=one,
            forward=run(one, adapter),
            backward=lambda logits: None,
            clear=lambda: None,
        )
        for name, (one, adapter) in ways.items()
    ]


if __name__ == "__main__":
    main()
