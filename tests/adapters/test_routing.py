"""Mixing weights of every policy, from given logits and given uniform numbers."""

import pytest
import torch

from mhr_scale.adapters import AdapterConfig, routing

SHAPE_UGQS = (4, 3, 2, 5)
SEEDS = (3, 1, 4, 5)


def make_logits():
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randn(SHAPE_UGQS, generator=generator, dtype=torch.float64)


def config_of(policy, **options):
    return AdapterConfig(n_skills=5, n_splits=2, policy=policy, **options)


def uniform_of_rows():
    return routing.uniform_numbers(SEEDS, SHAPE_UGQS[1:]).double()


# --- learned


@pytest.mark.parametrize("policy", ["learned", "fixed"])
@pytest.mark.parametrize("seeds", [None, SEEDS], ids=["evaluating", "training"])
def test_learned_weights_are_normalised_sigmoids(policy, seeds):
    logits = make_logits()
    p = 1.0 / (1.0 + (-logits).exp())
    found = routing.mixing_weights(logits, config_of(policy), seeds=seeds)
    torch.testing.assert_close(found, p / p.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12)


def test_new_logits_lie_within_a_thousandth_of_zero():
    logits = routing.init_logits((10, 4, 2, 8), generator=torch.Generator().manual_seed(0))
    assert 0.9e-3 < logits.abs().max() <= 1e-3


# --- noisy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_noisy_weights_are_relaxed_bernoulli_of_the_rows_numbers(temperature):
    logits, u = make_logits(), uniform_of_rows()
    p = torch.sigmoid((logits + torch.log(u / (1.0 - u))) / temperature)
    found = routing.mixing_weights(logits, config_of("noisy", temperature=temperature), seeds=SEEDS)
    torch.testing.assert_close(found, p / p.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12)


def test_noisy_weights_have_the_gradient_of_the_relaxed_sample():
    logits, u = make_logits().requires_grad_(), uniform_of_rows()
    cotangent = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(SHAPE_UGQS)
    p = torch.sigmoid(logits + torch.log(u / (1.0 - u)))
    ((p / p.sum(-1, keepdim=True)) * cotangent).sum().backward()
    expected, logits.grad = logits.grad, None
    (routing.mixing_weights(logits, config_of("noisy"), seeds=SEEDS) * cotangent).sum().backward()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("side", "extreme"), [("min", 0.0), ("max", 1.0 - 2.0**-24)], ids=["smallest", "largest"]
)
def test_noise_is_finite_for_the_most_extreme_numbers(side, extreme, dtype):
    shape = (2**20, 1, 1)
    blocks = ((seed, routing.uniform_numbers((seed,), shape)) for seed in range(1000))
    seed = next(seed for seed, u in blocks if getattr(u, side)().item() == extreme)
    logits = torch.zeros(1, *shape, dtype=dtype, requires_grad=True)
    activations = routing.noisy(logits, config_of("noisy"), (seed,))
    activations.sum().backward()
    assert activations.isfinite().all()
    assert logits.grad.isfinite().all()


def test_noise_at_a_low_temperature_switches_skills_on_or_off():
    config = config_of("noisy", temperature=1e-3)
    activations = routing.noisy(make_logits(), config, SEEDS)
    near = (activations < 0.01) | (activations > 0.99)
    assert near.double().mean() > 0.95


# --- straight through


def test_straight_through_weights_are_normalised_rounded_sigmoids():
    logits = make_logits()
    mask = (logits > 0).double()
    expected = mask / (mask.sum(-1, keepdim=True) + 1e-12)
    found = routing.mixing_weights(logits, config_of("straight_through"), seeds=SEEDS)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_straight_through_gradient_is_the_rounded_value_s_times_the_sigmoid_s():
    logits = make_logits().requires_grad_()
    cotangent = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(SHAPE_UGQS)
    weights = routing.mixing_weights(logits, config_of("straight_through"), seeds=SEEDS)
    keep = (logits > 0).any(-1, keepdim=True)  # no skill on: 1e-12 in the denominator
    (weights * keep * cotangent).sum().backward()
    mask = (logits.detach() > 0).double().requires_grad_()
    ((mask / (mask.sum(-1, keepdim=True) + 1e-12)) * keep * cotangent).sum().backward()
    sigmoid = torch.sigmoid(logits.detach())
    expected = mask.grad * sigmoid * (1.0 - sigmoid)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)


# --- no draws while evaluating


@pytest.mark.parametrize("policy", ["noisy", "straight_through"])
def test_weights_without_seeds_are_plain_sigmoids(policy):
    logits = make_logits()
    expected = routing.mixing_weights(logits, config_of("learned"), seeds=None)
    found = routing.mixing_weights(logits, config_of(policy), seeds=None)
    assert torch.equal(found, expected)


# --- seeds


def test_a_row_s_numbers_depend_on_its_seed_alone():
    first = routing.uniform_numbers((3, 1, 4), (2, 6))
    second = routing.uniform_numbers((1, 5), (2, 6))
    assert torch.equal(first[1], second[0])


def test_different_seeds_have_different_numbers():
    first, second = routing.uniform_numbers((3, 4), (2, 6))
    assert not torch.isclose(first, second).any()


def test_a_row_s_numbers_differ_between_groups_splits_and_skills():
    numbers = routing.uniform_numbers((3,), SHAPE_UGQS[1:])
    assert len(numbers.flatten().unique()) == numbers.numel()


def test_numbers_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    routing.uniform_numbers(SEEDS, (100,))
    assert torch.equal(torch.get_rng_state(), before)


# --- random masks


def masks(seeds, shape_GQS, probability):
    n_groups, _, n_skills = shape_GQS
    return routing.uniform_numbers(seeds, (n_groups, 1, n_skills)) < probability


def random_weights(*, n_rows=200, **options):
    config = AdapterConfig(n_skills=5, n_splits=2, policy="random", **options)
    logits = torch.zeros(n_rows, *SHAPE_UGQS[1:])
    return routing.mixing_weights(logits, config, seeds=range(n_rows))


def test_random_weights_are_the_mask_over_its_sum():
    mask = masks(range(200), SHAPE_UGQS[1:], 0.5).float()
    expected = (mask / mask.sum(-1, keepdim=True)).nan_to_num(0.0).expand(-1, -1, 2, -1)
    torch.testing.assert_close(random_weights(), expected)


def test_a_random_mask_is_the_same_for_all_splits():
    weights = random_weights()
    assert torch.equal(weights[:, :, 0], weights[:, :, 1])


def test_random_masks_differ_between_rows_and_groups():
    weights = random_weights(n_rows=20).flatten(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in weights}) > 10


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_a_skill_is_on_with_the_given_probability(probability):
    on = (random_weights(n_rows=2000, random_probability=probability)[:, :, 0] > 0).double()
    assert on.mean().item() == pytest.approx(probability, abs=0.01)


def test_a_row_without_any_skill_is_off_by_default():
    empty = ~masks(range(200), SHAPE_UGQS[1:], 0.2).any(-1).squeeze(-1)
    assert not random_weights(random_probability=0.2)[empty].any()


def test_a_row_without_any_skill_may_get_the_mean():
    empty = ~masks(range(200), SHAPE_UGQS[1:], 0.2).any(-1).squeeze(-1)
    weights = random_weights(random_probability=0.2, random_empty="uniform")[empty]
    torch.testing.assert_close(weights, torch.full_like(weights, 0.2))


def test_the_mean_for_empty_rows_leaves_the_others_alone():
    filled = masks(range(200), SHAPE_UGQS[1:], 0.2).any(-1).squeeze(-1)
    off = random_weights(random_probability=0.2)[filled]
    mean = random_weights(random_probability=0.2, random_empty="uniform")[filled]
    assert torch.equal(off, mean)
