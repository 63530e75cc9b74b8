"""What jobs of every kind start from, and how they are put side by side and taken out again.

Shape letters: T tasks, Q splits, S skills, I and O features of one split, R rank.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from small_jobs import MHR, SOURCE_TASKS, assert_same, make_source, sites, tensors_of
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.adapters.collapse import average
from mhr_scale.config import SoupConfig, VariantConfig
from mhr_scale.errors import ConfigError
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.start import (
    check_variant,
    config_of,
    count_trained,
    stack,
    start,
    trained_numbers,
    unstack,
)

LORA = AdapterConfig(n_skills=1, rank=2)
IA3 = AdapterConfig(kind="ia3", layout="light", n_skills=1)
PRIVATE = replace(LORA, private=True)
FULL = VariantConfig(adapter="source")
ROUTING = VariantConfig(adapter="source", kind="routing")
MEAN = VariantConfig(adapter="source", kind="average")
INVENTORY = VariantConfig(adapter="source", kind="average", trainable="inventory")
SOUP = VariantConfig(adapter="source", kind="soup", soup=SoupConfig(adapters=2))
#: Adapters of every sort that a wave may hold.
KINDS = {
    "MHR": MHR,
    "Poly by block": AdapterConfig(n_skills=3, granularity="block"),
    "noisy": replace(MHR, policy="noisy"),
    "uniform": replace(MHR, policy="uniform"),
    "random": replace(MHR, policy="random"),
    "LoRA": LORA,
    "light LoRA": replace(LORA, layout="light"),
    "(IA)3": IA3,
    "MHR-(IA)3": replace(IA3, n_skills=3, n_splits=4),
}


def begin(variant: VariantConfig, source: Adapter | None, **changes) -> Adapter:
    similar = changes.pop("similar", ())
    job = Job(**{"task": "new", "seed": 0, "variant": "v", **changes})
    config = source.config if source else variant.fresh
    return start(job, variant, source, sites=sites(config.layout), similar=similar)


def inventory(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors_of(adapter).items() if not n.endswith("routing_logits")}


# --- full and routing


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_starts_from_the_very_inventory_of_its_source(kind):
    source = make_source(KINDS[kind])
    for variant in (FULL, ROUTING):
        made = begin(variant, source)
        assert_same(inventory(made), inventory(source))
        assert made.config == source.config
        assert made.task_names == ("new",)


@pytest.mark.parametrize("variant", [FULL, ROUTING], ids=lambda v: v.kind)
def test_a_job_has_a_routing_row_of_its_own_close_to_uniform(variant):
    rows = [begin(variant, make_source(), seed=seed).routing_logits for seed in (0, 1, 0)]
    assert rows[0].shape == (1, 18, 4, 4)
    assert 5e-4 < rows[0].abs().max() <= 1e-3
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_the_routing_of_the_training_tasks_does_not_matter():
    source = make_source()
    before = begin(FULL, source)
    torch.nn.init.constant_(source.routing_logits, 5.0)
    assert_same(tensors_of(begin(FULL, source)), tensors_of(before))


@pytest.mark.parametrize("variant", [FULL, ROUTING], ids=lambda v: v.kind)
def test_routing_that_was_fixed_learns_in_a_job(variant):
    made = begin(variant, make_source(replace(MHR, policy="fixed")))
    assert made.config == MHR
    assert made.routing_logits.requires_grad


def test_a_job_shares_no_memory_with_its_source():
    source = make_source()
    before = tensors_of(source)
    for parameter in begin(FULL, source).parameters():
        torch.nn.init.zeros_(parameter)
    assert_same(tensors_of(source), before)


# --- average


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_on_the_mean_starts_from_the_averaged_adapter(kind):
    source = make_source(KINDS[kind])
    made, expected = begin(MEAN, source), average(source)
    assert_same(tensors_of(made), tensors_of(expected))
    assert made.config == expected.config
    assert not made.config.is_routed
    assert made.task_names == ("new",)


def test_the_mean_is_over_the_skills_of_each_side_and_split():
    source = make_source()
    made = tensors_of(begin(MEAN, source))
    for name, tensor in inventory(source).items():
        mean_QXY = tensor.mean(1)  # A (Q, S, I, R) or B (Q, S, R, O)
        whole = mean_QXY.flatten(0, 1) if name.endswith("A") else torch.cat(list(mean_QXY), -1)
        torch.testing.assert_close(made[name][0, 0], whole)


def test_the_inventory_under_uniform_routing_keeps_all_skills():
    source = make_source()
    made = begin(INVENTORY, source)
    assert made.config == replace(MHR, policy="uniform")
    assert made.routing_logits is None
    assert_same(tensors_of(made), inventory(source))


def test_the_inventory_of_a_single_pair_is_that_pair():
    source = make_source(LORA)
    assert_same(tensors_of(begin(INVENTORY, source)), tensors_of(source))


@pytest.mark.parametrize("config", [PRIVATE, replace(MHR, private=True)], ids=["LoRA", "MHR"])
def test_the_mean_of_private_adapters_is_over_tasks_and_skills(config):
    source = make_source(config)
    made = tensors_of(begin(MEAN, source))
    for name, tensor in inventory(source).items():
        mean_QXY = tensor.mean(0).mean(1)  # A (T, Q, S, I, R) or B (T, Q, S, R, O)
        whole = mean_QXY.flatten(0, 1) if name.endswith("A") else torch.cat(list(mean_QXY), -1)
        torch.testing.assert_close(made[name][0, 0], whole)


# --- soup


def test_a_soup_is_the_mean_of_the_chosen_pairs_each_side_apart():
    source = make_source(PRIVATE)
    made = begin(SOUP, source, similar=["sort", "copy"])
    assert made.config == LORA
    for name, tensor in inventory(source).items():
        assert torch.equal(tensors_of(made)[name], (tensor[2] + tensor[0]) / 2)


def test_a_soup_of_one_is_that_task_s_adapter():
    source = make_source(PRIVATE)
    made = begin(SOUP, source, similar=["reverse"])
    assert_same(tensors_of(made), {n: t[1] for n, t in inventory(source).items()})


# --- fresh


def test_fresh_pairs_leave_the_backbone_as_it_is():
    made = begin(VariantConfig(fresh=MHR), None)
    for name, tensor in tensors_of(made).items():
        if name.endswith("B"):
            assert not tensor.any()
        else:
            bound = 1e-3 if name.endswith("logits") else (3 * 32) ** -0.5
            assert 0.2 * bound < tensor.abs().max() <= bound


def test_fresh_vectors_are_one():
    made = begin(VariantConfig(fresh=IA3), None)
    assert all(torch.equal(t, torch.ones_like(t)) for t in tensors_of(made).values())


def test_fresh_adapters_differ_between_seeds_alone():
    first, second, other_task = (
        tensors_of(begin(VariantConfig(fresh=MHR), None, **changes))
        for changes in ({}, {"seed": 1}, {"task": "another"})
    )
    assert_same(first, other_task)
    assert all(not torch.equal(first[n], second[n]) for n in first if not n.endswith("B"))


def test_a_fresh_job_has_no_use_for_private_inventories():
    assert begin(VariantConfig(fresh=PRIVATE), None).config == LORA


# --- refused at the door


@pytest.mark.parametrize(
    ("variant", "config", "words"),
    [
        (SOUP, MHR, "soup averages private adapters, source is MHR"),
        (SOUP, LORA, "soup averages private adapters, source is LoRA"),
        (SOUP, replace(MHR, private=True), "adapter.private: true and n_skills: 1"),
        (
            replace(SOUP, soup=SoupConfig(adapters=4)),
            PRIVATE,
            r"adapters: 4, but source has 3 task",
        ),
        (FULL, PRIVATE, "kind: full, but every task of source has an inventory of its own"),
        (ROUTING, PRIVATE, "use soup or average"),
        (INVENTORY, PRIVATE, "trainable: private inventories have a mean only"),
        (ROUTING, LORA, "routing, but source is LoRA .* has no routing to train"),
        (ROUTING, replace(MHR, policy="random"), "is Random with policy 'random'"),
        (ROUTING, replace(MHR, policy="uniform"), "policy 'uniform' and has no routing"),
    ],
)
def test_a_variant_that_its_source_cannot_give_is_refused(variant, config, words):
    source = Adapter(config, sites(), task_names=SOURCE_TASKS)
    with pytest.raises(ConfigError, match=rf"variants\.mine\..*{words}"):
        check_variant("mine", variant, source)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        (SOUP, PRIVATE),
        (MEAN, PRIVATE),
        (FULL, LORA),
        (INVENTORY, LORA),
        (ROUTING, replace(MHR, policy="fixed")),
        (FULL, replace(MHR, policy="random")),
    ],
)
def test_a_variant_that_its_source_can_give_is_not_refused(variant, config):
    check_variant("mine", variant, Adapter(config, sites(), task_names=SOURCE_TASKS))


def test_a_fresh_variant_needs_no_source():
    check_variant("mine", VariantConfig(fresh=PRIVATE), None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "an adapter to start from, or fresh settings"),
        ({"adapter": "x", "fresh": LORA}, "an adapter to start from, or fresh settings"),
        ({"fresh": LORA, "kind": "average"}, "kind average starts from an adapter"),
        ({"fresh": LORA, "kind": "routing"}, "kind routing starts from an adapter"),
        ({"adapter": "x", "steps": 0}, "steps 0 is not at least 1"),
    ],
)
def test_settings_of_a_variant_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        VariantConfig(**settings)


# --- side by side


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_come_out_of_a_wave_as_they_went_in(kind):
    jobs = [make_source(KINDS[kind], tasks=["new"]) for _ in range(3)]
    for number, job in enumerate(jobs):
        for parameter in job.parameters():
            parameter.data.mul_(1.0 + number)
    wave = stack(["a", "b", "c"], jobs, routing_only=False)
    assert wave.task_names == ("a", "b", "c")
    assert all(p.requires_grad for p in wave.inventory.parameters())
    for number, job in enumerate(jobs):
        out = unstack(wave, number, "new")
        assert_same(tensors_of(out), tensors_of(job))
        assert (out.config, out.task_names) == (job.config, ("new",))


def test_jobs_that_train_routing_share_one_frozen_inventory():
    source = make_source()
    jobs = [begin(ROUTING, source, seed=seed) for seed in range(3)]
    wave = stack(["a", "b", "c"], jobs, routing_only=True)
    assert {n for n, p in wave.named_parameters() if p.requires_grad} == {"routing_logits"}
    assert sum(p.numel() for p in wave.inventory.parameters()) == sum(
        p.numel() for p in source.inventory.parameters()
    )
    for number, job in enumerate(jobs):
        assert_same(tensors_of(unstack(wave, number, "new")), tensors_of(job))


def test_a_job_taken_out_shares_no_memory_with_its_wave():
    wave = stack(["a", "b"], [make_source(tasks=["new"]) for _ in range(2)], routing_only=False)
    before = tensors_of(wave)
    for parameter in unstack(wave, 1, "new").parameters():
        torch.nn.init.zeros_(parameter)
    assert_same(tensors_of(wave), before)


# --- parameter counts


@cache
def sites_of_xl(layout: str):
    config = T5Config(
        d_model=2048,
        num_heads=32,
        d_ff=5120,
        d_kv=64,
        num_layers=24,
        num_decoder_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return find_sites(T5ForConditionalGeneration(config), layout)


@pytest.mark.parametrize(
    ("options", "routing_only", "count"),
    [
        ({"n_skills": 1}, False, 2_211_840),
        ({"n_skills": 8, "n_splits": 64}, False, 17_694_720 + 221_184),
        ({"n_skills": 8, "n_splits": 64}, True, 221_184),
        ({"n_skills": 1, "kind": "ia3", "layout": "light"}, False, 540_672),
    ],
    ids=str,
)
def test_a_job_on_t5_xl_trains_the_numbers_of_the_paper(options, routing_only, count):
    config = AdapterConfig(**options)
    found = count_trained(config, sites_of_xl(config.layout), routing_only=routing_only)
    assert found == count


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_that_of_the_tensors_that_train(kind):
    source = make_source(KINDS[kind])
    variants = (FULL, MEAN, INVENTORY, *((ROUTING,) if KINDS[kind].has_logits else ()))
    for variant in variants:
        is_routing = variant.kind == "routing"
        wave = stack([*"abc"], [begin(variant, source)] * 3, routing_only=is_routing)
        expected = sum(p.numel() for p in wave.parameters() if p.requires_grad) / 3
        counted = count_trained(config_of(variant, source), source.sites, routing_only=is_routing)
        assert counted == trained_numbers(wave) == expected, variant
