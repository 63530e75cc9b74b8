"""Which placements there are, what they hold and move, and which one is taken."""

import random
from dataclasses import replace
from typing import Any

import pytest

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig, HardwareConfig
from mhr_scale.errors import ConfigError
from mhr_scale.families.table import known_fields
from mhr_scale.planning import plan_table
from mhr_scale.planning.cost import Case, Estimate, Passes, choose
from mhr_scale.planning.hardware import CARDS, PROCESS_GIB, Machines, find_machines
from mhr_scale.planning.placements import Placement, Weights, list_placements, load_of, weigh
from mhr_scale.planning.sizes import read_sizes
from mhr_scale.planning.tracing import Trace

XXL = BackboneConfig(name="bigscience/T0")
GIB = 2.0**30


@pytest.fixture(scope="module")
def xxl() -> Weights:
    return weigh(read_sizes(XXL))


def machines(**given: Any) -> Machines:
    return find_machines(HardwareConfig(**{"gpu": "A100-40G", "gpus": 8, **given}))


def named(name: str, many: Machines) -> Placement:
    return next(one for one in list_placements(many, "bfloat16") if one.name == name)


# -- machines --------------------------------------------------------------------------------------


def test_an_unknown_card_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"hardware.gpu: no card 'A100-80GB' .*'A100-80G'"):
        find_machines(HardwareConfig(gpu="A100-80GB"))


def test_cards_that_do_not_divide_over_machines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hardware.nodes: 6 cards do not divide over 4"):
        HardwareConfig(gpus=6, nodes=4)


@pytest.mark.parametrize("name", ["memory_gib", "network_gb_s"])
def test_figures_that_are_not_above_zero_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"hardware.{name}: 0.0 is not above 0"):
        HardwareConfig(**{name: 0.0})  # type: ignore[arg-type]


def test_what_is_given_wins_over_the_table() -> None:
    given = machines(memory_gib=10.0, link_gb_s=100.0, host_memory_gib=64.0)
    assert (given.memory, given.link_rate, given.host_memory) == (10 * GIB, 1e11, 64 * GIB)
    assert given.host_rate == CARDS["A100-40G"].host_gb_s * 1e9


def test_without_a_card_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    here = find_machines(HardwareConfig())
    assert (here.name, here.ranks, here.on_gpu) == ("cpu", 1, False)
    assert min(here.bf16_flops, here.fp32_flops, here.memory_rate, here.memory) > 0


# -- weights ---------------------------------------------------------------------------------------


def test_the_numbers_of_t0_are_counted_without_its_weights(xxl: Weights) -> None:
    assert xxl.total == 11_135_332_352
    assert xxl.largest == 32128 * 4096
    assert xxl.largest_in_blocks == 4096 * 10240


def test_known_backbones_have_the_sizes_that_t5_has() -> None:
    totals = {"google/t5-v1_1-small": 76_961_152, "google/t5-xl-lm-adapt": 2_849_757_184}
    for name, total in totals.items():
        assert weigh(read_sizes(BackboneConfig(name=name))).total == total
    assert known_fields("bigscience/T0_3B") is not None


def test_replicated_weights_take_what_their_type_says(xxl: Weights) -> None:
    here = machines()
    bytes_of = {
        one.name: load_of(one, xxl, here).weights
        for one in list_placements(here, "bfloat16")
        if not one.is_sharded
    }
    assert bytes_of["replicated bf16"] == 2 * xxl.total
    outside = 2 * (xxl.total - xxl.in_blocks)
    assert bytes_of["replicated int8"] == pytest.approx(xxl.in_blocks + outside, rel=0.01)
    assert bytes_of["replicated nf4"] == pytest.approx(0.516 * xxl.in_blocks + outside, rel=0.01)


def test_sharded_weights_divide_and_what_is_whole_at_once_is_bounded(xxl: Weights) -> None:
    here = machines()
    load = load_of(named("zero3", here), xxl, here)
    assert load.weights == 2 * xxl.total / 8
    assert load.gathered == 2 * (3e8 + 5e7)
    assert load.over_links == pytest.approx(2 * xxl.total * 7 / 8)
    assert load.over_network == load.from_host == 0.0


def test_a_backbone_below_the_bounds_is_gathered_once_and_for_all() -> None:
    small = weigh(read_sizes(BackboneConfig(name="google/t5-v1_1-small")))
    here = machines()
    load = load_of(named("zero3", here), small, here)
    assert load.gathered == 2 * small.total
    assert load.over_links == 0.0


def test_between_machines_gathers_take_the_network_unless_a_node_keeps_a_copy(
    xxl: Weights,
) -> None:
    here = machines(gpus=16, nodes=2)
    plain, plus = (load_of(named(name, here), xxl, here) for name in ("zero3", "zero3 plusplus"))
    assert plain.over_network > 0.0 == plain.over_links
    assert plus.over_links > 0.0 == plus.over_network
    assert plus.weights == plain.weights + 2 * xxl.total / 8


def test_offloaded_weights_lie_on_the_host_and_cross_its_link(xxl: Weights) -> None:
    here = machines()
    for kind in ("cpu", "nvme"):
        load = load_of(named(f"zero3 offload {kind}", here), xxl, here)
        assert (load.weights, load.from_host) == (0.0, 2 * xxl.total / 8)
        assert load.host == (2 * xxl.total if kind == "cpu" else 8 * 16 * 1.5e8 * 2)
        assert load.from_nvme == (2 * xxl.total if kind == "nvme" else 0.0)


def test_one_card_has_no_shards_but_those_of_the_host() -> None:
    names = [one.name for one in list_placements(machines(gpus=1), "bfloat16")]
    assert "zero3" not in names
    assert {"zero3 offload cpu", "zero3 offload nvme", "replicated nf4"} <= set(names)


def test_no_placement_is_of_wider_numbers_than_the_recipe(xxl: Weights) -> None:
    here = machines()
    wide, narrow = (
        {one.name: one for one in list_placements(here, dtype)} for dtype in ("float32", "bfloat16")
    )
    assert wide.keys() - narrow.keys() == {"replicated fp32"}
    assert load_of(wide["replicated fp32"], xxl, here).weights == 4 * xxl.total
    assert {one.dtype for one in narrow.values()} == {"bfloat16"}


# -- the choice ------------------------------------------------------------------------------------


def estimates(weights: Weights, here: Machines, *, activation_gib: float = 1.0) -> list[Estimate]:
    """Estimates of passes whose activations and time do not depend on the placement."""

    def trace(rows: int) -> Trace:
        return Trace(
            peaks={"forward": rows * activation_gib * GIB},
            logits={"forward": 0.0},
            held={"gradients": 0.0, "optimizer": 0.0},
            passes={(1e12 * rows, 1e9): 10.0},
            update={},
        )

    return [
        Case(
            placement=one,
            recompute="none",
            load=load_of(one, weights, here),
            machines=here,
            counts=Passes(few=2, many=4, of_few=trace(2), of_many=trace(4)),
            adapter_bytes=0.0,
            trains=True,
            reduces=False,
            is_same_precision=(one.dtype, one.quantise) == ("bfloat16", "none"),
        ).estimate(1, passes=1, tokens=100.0)
        for one in list_placements(here, "bfloat16")
    ]


def taken(weights: Weights, here: Machines, **given: float) -> str | None:
    chosen = choose(estimates(weights, here, **given), by=lambda one: one.step_seconds)
    return None if chosen is None else chosen.placement.name


@pytest.mark.parametrize(
    ("card", "gpus", "name"),
    [
        ("A100-40G", 1, "replicated bf16"),
        ("A100-40G", 8, "replicated bf16"),
        ("H200", 1, "replicated bf16"),
        ("RTX-4090", 1, "replicated int8"),
        ("RTX-3090", 1, "replicated int8"),
        ("RTX-4090", 8, "zero3"),
    ],
)
def test_t0_lies_where_it_fits_and_is_fastest(
    xxl: Weights, card: str, gpus: int, name: str
) -> None:
    assert taken(xxl, machines(gpu=card, gpus=gpus), activation_gib=2.0) == name


def test_four_bits_are_for_cards_that_eight_do_not_fit(xxl: Weights) -> None:
    small = machines(gpu="V100-16G", gpus=1, memory_gib=14.0)
    assert taken(xxl, small, activation_gib=2.0) == "replicated nf4"


def test_where_nothing_fits_nothing_is_taken(xxl: Weights) -> None:
    assert taken(xxl, machines(gpu="L4", gpus=1), activation_gib=30.0) is None


def test_the_largest_number_of_rows_is_the_last_that_fits(xxl: Weights) -> None:
    here = machines()
    for one in estimates(xxl, here):
        if one.largest_rows:
            most = here.usable - one.memory.weights - one.memory.gathered
            assert one.largest_rows == int(most / GIB)


def test_a_card_that_is_too_small_says_by_how_much(xxl: Weights) -> None:
    small = machines(memory_gib=20.0)
    one = next(e for e in estimates(xxl, small) if e.placement.name == "replicated bf16")
    assert (one.fits, one.largest_rows) == (False, 0)
    assert one.why_not == "21.7 GiB for one row, 18.0 GiB usable"


def test_weights_that_no_machine_can_hold_are_not_offloaded_to_it(xxl: Weights) -> None:
    here = machines(host_memory_gib=16.0)
    offloads = {e.placement.offload: e for e in estimates(xxl, here)}
    assert offloads["cpu"].why_not == "24.7 GiB of a machine's memory, 14.4 GiB usable"
    assert offloads["nvme"].why_not == "39.8 GiB of a machine's memory, 14.4 GiB usable"
    roomy = machines(host_memory_gib=48.0)
    assert {e.placement.offload: e.fits for e in estimates(xxl, roomy)}["nvme"]


def test_what_fits_takes_neither_more_than_a_rank_nor_more_than_a_machine_has(
    xxl: Weights,
) -> None:
    draw = random.Random(0)
    fitted = set()
    for _ in range(300):
        gpu = draw.choice(["cpu", "A100-40G", "RTX-4090", "V100-16G"])
        here = replace(
            machines(gpu="A100-40G", gpus=8),
            name=gpu,
            ranks=(ranks := draw.choice([1, 2, 8])),
            nodes=draw.choice([1, ranks]),
            memory=2.0 ** draw.uniform(1, 7) * GIB,
            host_memory=draw.choice([None, 2.0 ** draw.uniform(2, 9) * GIB]),
        )
        tried = estimates(xxl, here, activation_gib=draw.uniform(0.01, 4.0))
        chosen = choose(tried, by=lambda one: one.step_seconds)
        assert chosen is None or chosen.fits
        for one in (one for one in tried if one.fits):
            fitted.add((here.on_gpu, one.placement.name))
            assert one.memory.total <= here.usable
            own = PROCESS_GIB * GIB if here.on_gpu else one.memory.total
            load = load_of(one.placement, xxl, here)
            assert one.memory.host == here.ranks_per_node * own + load.host
            assert here.host_memory is None or one.memory.host <= 0.9 * here.host_memory
            assert here.on_gpu or one.memory.host <= here.ranks_per_node * here.memory
    assert (False, "zero3 offload cpu") not in fitted
    assert {(False, "replicated bf16, mapped"), (False, "zero3"), (True, "zero3 offload nvme")} < (
        fitted
    )


def test_mapped_weights_take_no_memory_but_are_read_again_where_there_is_too_little(
    xxl: Weights,
) -> None:
    size = 2.0 * xxl.total

    def mapped(gib: float) -> Estimate:
        here = replace(machines(), name="cpu", ranks=2, memory=gib * GIB / 2, host_memory=None)
        return next(
            e for e in estimates(xxl, here) if e.placement.name == "replicated bf16, mapped"
        )

    roomy, tight = mapped(30.0), mapped(10.0)
    assert roomy.memory.weights == tight.memory.weights == 0.0
    assert roomy.memory.host == 2 * roomy.memory.total == 2 * (1.0 + PROCESS_GIB) * GIB
    assert (roomy.fits, tight.fits) == (True, True)
    assert roomy.seconds.disk == 0.0
    assert tight.seconds.disk == pytest.approx(2 * (size - 7 * GIB) / 1e9)
    assert tight.seconds.limit == "files read again"
    copied = replace(roomy, placement=replace(roomy.placement, is_mapped=False))
    assert choose([copied, roomy], by=lambda one: one.step_seconds) is roomy


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_quantised_folder_has_one_placement(on_gpu: bool, xxl: Weights) -> None:
    here = machines() if on_gpu else replace(machines(), name="cpu")
    (placement,) = list_placements(here, "bfloat16", stored="int8")
    load = load_of(placement, xxl, here)
    assert placement.settings["backbone.quantise"] == "int8"
    assert (load.weights > 1e10, load.mapped > 1e10) == (on_gpu, not on_gpu)


def test_numbers_are_not_rounded_to_nothing() -> None:
    assert [plan_table._gib(size) for size in (0.0, 1.0, 0.005 * GIB, GIB)] == [
        *("-", "<0.01", "0.01", "1.00")
    ]
    assert plan_table._rate(2.1e11) == "210 GFLOP/s"
    assert plan_table._rate(1.2e13) == "12 TFLOP/s"
    assert plan_table._figure(0.00123) == "0.00123"


def test_slow_links_limit_a_sharded_step(xxl: Weights) -> None:
    fast, slow = (
        next(e for e in estimates(xxl, here) if e.placement.name == "zero3")
        for here in (machines(), machines(link_gb_s=1.0))
    )
    assert slow.seconds.limit == "gathers over links"
    assert slow.step_seconds > fast.step_seconds


def test_every_placement_names_a_file_that_is_read() -> None:
    from mhr_scale.engine.ds_config import read_ds_config

    everywhere = machines(gpus=16, nodes=2)
    files = {one.ds_config for one in list_placements(everywhere, "bfloat16")}
    assert len(files) == 5
    for file in files:
        stage = read_ds_config(file)["zero_optimization"]["stage"]
        assert stage == (0 if file.endswith("replicated.json") else 3)


def test_sizes_come_from_a_folder_without_its_weights(tmp_path: Any) -> None:
    sizes = '"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4'
    text = f'{{"model_type": "t5", "vocab_size": 100, {sizes}}}'
    (tmp_path / "config.json").write_text(text)
    config = BackboneConfig(name=str(tmp_path))
    written = replace(config, name=None, config={"vocab_size": 100, "d_model": 32, "d_kv": 8})
    assert read_sizes(config).model_config.d_ff == 64
    assert read_blueprint(written).model_config.d_model == 32
