"""The table of methods: how many slots a batch has, and what fills and trains them."""

import pytest
import torch
from every_method import CONFIGS, SEEDS, TASK_IDS
from tiny import TASKS, gradients, logits, make_adapted, tensors_of

from mhr_scale.adapters import AdapterConfig
from mhr_scale.adapters.collapse import average, collapse, take_task

ROUTED = [name for name, config in CONFIGS.items() if config.has_logits]


def n_slots(adapter, task_ids):
    with adapter.slots(task_ids):
        return {linear.slots.rows.n_slots for linear in adapter.linears}


@pytest.mark.parametrize(
    ("name", "training", "evaluating"),
    [
        ("LoRA", 1, 1),
        ("(IA)3", 1, 1),
        ("Poly", 3, 3),
        ("MHR", 3, 3),
        ("Poly-(IA)3", 3, 3),
        ("MHR-(IA)3", 3, 3),
        ("straight-through", 3, 3),
        ("noisy", 5, 3),
        ("Random", 5, 1),
        ("uniform", 1, 1),
        ("fixed", 3, 3),
        ("private", 3, 3),
        ("private MHR", 3, 3),
        ("private (IA)3", 3, 3),
    ],
)
def test_a_batch_of_five_rows_and_three_tasks_fills_as_many_slots_as_its_method_needs(
    name, training, evaluating
):
    model, adapter = make_adapted(CONFIGS[name])
    while_training = n_slots(adapter, TASK_IDS)
    model.eval()
    assert (while_training, n_slots(adapter, TASK_IDS)) == ({training}, {evaluating})


def test_a_method_has_the_name_it_has_in_tables():
    names = ["LoRA", "(IA)3", "Poly", "MHR", "Poly-(IA)3", "MHR-(IA)3", "Random", "private"]
    assert [CONFIGS[name].method for name in names] == names


def test_only_policies_that_learn_or_keep_a_routing_have_logits():
    for name, config in CONFIGS.items():
        _, adapter = make_adapted(config)
        assert (adapter.routing_logits is not None) == (name in ROUTED), name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_trainable_tensor_gets_a_gradient(name):
    model, adapter = make_adapted(CONFIGS[name])
    found = gradients(model, adapter, TASK_IDS, seeds=SEEDS)
    trainable = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    assert {name: bool(found[name].any()) for name in trainable} == dict.fromkeys(trainable, True)


@pytest.mark.parametrize("name", ["LoRA", "(IA)3", "uniform"])
def test_without_routing_all_tasks_share_one_adapter(name):
    model, adapter = make_adapted(CONFIGS[name])
    assert torch.equal(logits(model, adapter, TASK_IDS), logits(model, adapter, [3] * 5))


@pytest.mark.parametrize("name", ["Random", "uniform"])
def test_evaluation_without_logits_uses_the_mean_of_the_inventory(name):
    model, adapter = make_adapted(CONFIGS[name])
    model.eval()
    found = logits(model, adapter, TASK_IDS)
    mean = average(adapter)
    mean.linears = adapter.linears
    torch.testing.assert_close(found, logits(model, mean, [0] * 5), rtol=1e-10, atol=1e-10)


def test_random_training_rows_of_one_task_differ():
    model, adapter = make_adapted(CONFIGS["Random"])
    found = [logits(model, adapter, [0] * 5, seeds=[seed] * 5) for seed in range(4)]
    assert len({tensor.sum().item() for tensor in found}) > 1


@pytest.mark.parametrize("name", ["private", "private MHR", "private (IA)3"])
def test_private_gradients_only_reach_the_pairs_of_present_tasks(name):
    model, adapter = make_adapted(CONFIGS[name])
    found = gradients(model, adapter, TASK_IDS)
    present = {
        tuple(bool(tensor.select(0 if name == "routing_logits" else 1, t).any()) for t in range(4))
        for name, tensor in found.items()
    }
    assert present == {(True, True, True, False)}


def test_private_tasks_train_as_if_each_had_its_own_adapter():
    model, adapter = make_adapted(CONFIGS["private"])
    together = gradients(model, adapter, (1, 1, 1))
    single = collapse(adapter, TASKS[1])
    single.linears = adapter.linears
    apart = gradients(model, single, (0, 0, 0))
    found = {name: tensor[:, 1] for name, tensor in together.items()}
    torch.testing.assert_close(found, apart, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["private", "private MHR", "private (IA)3"])
def test_a_batch_of_private_tasks_equals_each_task_taken_out_of_it(name):
    model, adapter = make_adapted(CONFIGS[name])
    mixed = logits(model, adapter, TASK_IDS)
    for row, task in enumerate(TASK_IDS):
        single = take_task(adapter, task)
        single.linears = adapter.linears
        alone = logits(model, single, [0] * len(TASK_IDS))
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-12, atol=1e-12)


def test_fixed_logits_are_not_trainable():
    _, adapter = make_adapted(CONFIGS["fixed"])
    assert not adapter.routing_logits.requires_grad


def test_fixed_logits_get_no_gradient():
    model, adapter = make_adapted(CONFIGS["fixed"])
    assert "routing_logits" not in gradients(model, adapter, TASK_IDS)


def test_fixed_routing_computes_what_learned_routing_does():
    fixed_model, fixed = make_adapted(CONFIGS["fixed"])
    model, learned = make_adapted(AdapterConfig(n_skills=3, n_splits=4))
    assert torch.equal(logits(fixed_model, fixed, TASK_IDS), logits(model, learned, TASK_IDS))


def test_equal_skills_route_like_one_lora():
    model, adapter = make_adapted(CONFIGS["Poly"])
    for parameter in adapter.inventory.parameters():
        parameter.data = parameter.data[:, :, :1].expand_as(parameter.data).contiguous()
    found = logits(model, adapter, TASK_IDS)
    lora_model, lora = make_adapted(CONFIGS["LoRA"])
    for name, parameter in lora.inventory.named_parameters():
        parameter.data = adapter.inventory.get_parameter(name).data[:, :, :1].contiguous()
    torch.testing.assert_close(found, logits(lora_model, lora, [0] * 5), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["noisy", "Random"])
def test_a_row_with_a_seed_is_the_same_in_another_batch(name):
    model, adapter = make_adapted(CONFIGS[name])
    first = logits(model, adapter, (2, 0, 2, 1), seeds=(5, 6, 7, 8))
    second = logits(model, adapter, (1, 0, 3), seeds=(9, 6, 5))
    torch.testing.assert_close(first[1], second[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["noisy", "Random"])
def test_seeds_default_to_the_global_generator(name):
    model, adapter = make_adapted(CONFIGS[name])
    found = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found.append(logits(model, adapter, TASK_IDS))
    same, other = (torch.equal(found[0], tensor) for tensor in found[1:])
    assert (same, other) == (True, False)


@pytest.mark.parametrize("name", ["noisy", "Random", "straight-through"])
def test_evaluation_never_draws(name):
    model, adapter = make_adapted(CONFIGS[name])
    model.eval()
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        logits(model, adapter, TASK_IDS)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["noisy", "Random", "straight-through"])
def test_evaluation_ignores_seeds(name):
    model, adapter = make_adapted(CONFIGS[name])
    model.eval()
    found = logits(model, adapter, TASK_IDS, seeds=SEEDS)
    assert torch.equal(found, logits(model, adapter, TASK_IDS))


@pytest.mark.parametrize("name", ["noisy", "Random"])
def test_the_mode_of_the_model_decides_and_not_that_of_a_linear(name):
    model, adapter = make_adapted(CONFIGS[name])
    trained = logits(model, adapter, TASK_IDS, seeds=SEEDS)
    model.eval()
    evaluated = logits(model, adapter, TASK_IDS, seeds=SEEDS)
    adapter.linears[0].train()
    assert torch.equal(logits(model, adapter, TASK_IDS, seeds=SEEDS), evaluated)
    adapter.linears[0].eval()
    model.train()
    assert torch.equal(logits(model, adapter, TASK_IDS, seeds=SEEDS), trained)
    assert not torch.equal(trained, evaluated)


@pytest.mark.parametrize("name", ["noisy", "straight-through"])
def test_evaluation_uses_the_plain_sigmoid(name):
    model, adapter = make_adapted(CONFIGS[name])
    model.eval()
    learned_model, learned = make_adapted(AdapterConfig(n_skills=3, n_splits=4))
    assert tensors_of(adapter).keys() == tensors_of(learned).keys()
    found = logits(model, adapter, TASK_IDS)
    assert torch.equal(found, logits(learned_model, learned, TASK_IDS))
