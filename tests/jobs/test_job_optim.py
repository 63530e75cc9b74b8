"""Jobs stacked in a wave against the same jobs one after another, update by update."""

from dataclasses import replace

import pytest
import torch
from adapters.tiny import Recorder, tensors_of
from stacked_jobs import (
    CLIP_NORM,
    CONFIGS,
    N_JOBS,
    OPTIMIZERS,
    PLACES,
    SITES,
    STEPS,
    assert_same,
    draw_gradients,
    draw_rates,
    largest_difference,
    make_alone,
    make_wave,
    run_alone,
    run_wave,
    set_gradients,
    slices,
    start,
)
from transformers.optimization import Adafactor as Oracle

from mhr_scale.adapters import Adapter
from mhr_scale.config import OptimConfig
from mhr_scale.errors import RunError
from mhr_scale.jobs.job_optim import (
    clip_jobs,
    job_state,
    load_job_states,
    make_job_optimizer,
    set_job_rates,
    take_jobs,
)
from mhr_scale.training import checkpoint
from mhr_scale.training.optim import clip_gradients, gradient_norm, make_optimizer


def cases_of(pairs):
    return [
        pytest.param(
            kind, OPTIMIZERS[name], id=f"{kind}-{name}".replace(", ", "-").replace(" ", "-")
        )
        for kind, name in pairs
    ]


every_pair = pytest.mark.parametrize(
    ("kind", "optim"), cases_of((kind, name) for kind in CONFIGS for name in OPTIMIZERS)
)
#: Every shape of tensors and of their state.
each_shape = pytest.mark.parametrize(
    ("kind", "optim"),
    cases_of(
        [
            ("MHR", "adafactor"),
            ("Poly, rank 1", "adafactor, scale_parameter"),
            ("LoRA", "adafactor"),
            ("MHR-(IA)3", "adafactor"),
            ("routing only", "adafactor"),
            ("MHR", "adamw, decay"),
            ("(IA)3", "adamw"),
            ("routing only", "adamw"),
        ]
    ),
)
each_optimizer = pytest.mark.parametrize(
    ("kind", "optim"), cases_of([("MHR", "adafactor"), ("MHR", "adamw")])
)


# --- stacked equals separate


def check_as_alone(kind, optim, *, clip_norm=CLIP_NORM, dtype=torch.float64, tolerance=1e-12):
    """Every job of a wave moves as it does alone; returns the gradient norms."""
    alones, wave, optimizer = start(kind, optim, dtype=dtype)
    before = tensors_of(wave)
    jobs = range(N_JOBS)
    norms_TJ = run_wave(wave, optimizer, alones, jobs, range(STEPS), clip_norm=clip_norm)
    for job in jobs:
        norms_T = run_alone(alones[job], job, optim, clip_norm=clip_norm)
        torch.testing.assert_close(norms_TJ[:, job], norms_T)
        assert largest_difference(slices(wave, job), tensors_of(alones[job])) < tolerance
    trained = [name for name, p in wave.named_parameters() if p.requires_grad]
    assert all(not torch.equal(wave.get_parameter(name), before[name]) for name in trained)
    return norms_TJ


@every_pair
def test_every_job_of_a_wave_moves_as_it_does_alone(kind, optim):
    norms_TJ = check_as_alone(kind, optim)
    assert (norms_TJ > CLIP_NORM).any()
    assert (norms_TJ < CLIP_NORM).any()


@each_optimizer
def test_jobs_move_as_alone_without_clipping_and_in_float32(kind, optim):
    check_as_alone(kind, optim, clip_norm=None)
    check_as_alone(kind, optim, dtype=torch.float32, tolerance=1e-5)


@each_optimizer
def test_one_clip_and_one_optimizer_over_the_stack_would_be_another_method(kind, optim):
    alones, wave, _ = start(kind, optim)
    naive = make_optimizer(wave, optim)
    for step in range(STEPS):
        for group in naive.param_groups:
            group["lr"] = draw_rates(N_JOBS, step)[group["name"]][0].item()
        set_gradients(wave, [draw_gradients(alones[job], job, step) for job in range(N_JOBS)])
        clip_gradients(wave.parameters(), gradient_norm(wave.parameters()), CLIP_NORM)
        naive.step()
    run_alone(alones[0], 0, optim)
    assert largest_difference(slices(wave, 0), tensors_of(alones[0])) > 1e-3


def test_one_job_under_adamw_is_torch_s():
    optim = OptimConfig(name="adamw", weight_decay=0.1)
    alones, wave, optimizer = start("MHR", optim, n_jobs=1)
    parameters = [
        torch.nn.Parameter(tensor.clone()) for _, tensor in sorted(tensors_of(wave).items())
    ]
    groups = [
        {"params": parameters[:-1], "name": "inventory", "weight_decay": 0.1},
        {"params": parameters[-1:], "name": "routing", "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    for step in range(STEPS):
        gradients = draw_gradients(alones[0], 0, step)
        for group in oracle.param_groups:
            group["lr"] = draw_rates(N_JOBS, step)[group["name"]][0].item()
        set_gradients(wave, [gradients])
        for parameter, (name, _) in zip(parameters, sorted(gradients.items()), strict=True):
            parameter.grad = wave.get_parameter(name).grad.clone()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        oracle.step()
        set_job_rates(optimizer, {k: v[:1] for k, v in draw_rates(N_JOBS, step).items()})
        clip_jobs(wave, CLIP_NORM)
        optimizer.step()
    for (_, found), expected in zip(sorted(tensors_of(wave).items()), parameters, strict=True):
        torch.testing.assert_close(found, expected.data, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale_parameter", [False, True], ids=["plain", "scale_parameter"])
@pytest.mark.parametrize("kind", ["MHR", "LoRA", "(IA)3"])
def test_one_job_under_adafactor_is_transformers_on_the_linears_own_tensors(kind, scale_parameter):
    optim = OptimConfig(scale_parameter=scale_parameter)
    alones, wave, optimizer = start(kind, optim, n_jobs=1)

    def parts(name, tensor):
        """Tensors of the single linears (Q, S, ...); tables (1, Q * S) of the groups."""
        return list(tensor[0].flatten(1)[:, None] if name == "routing_logits" else tensor[:, 0])

    names = list(tensors_of(wave))
    starts = [parts(name, tensor) for name, tensor in tensors_of(wave).items()]
    parameters = [[torch.nn.Parameter(part.clone()) for part in own] for own in starts]
    groups = [
        {"params": own, "name": "routing" if name == "routing_logits" else "inventory"}
        for name, own in zip(names, parameters, strict=True)
    ]
    options = {"relative_step": False, "warmup_init": False, "lr": 1.0}
    oracle = Oracle(groups, scale_parameter=scale_parameter, **options)
    for step in range(STEPS):
        rates = draw_rates(N_JOBS, step)
        set_gradients(wave, [draw_gradients(alones[0], 0, step)])
        set_job_rates(optimizer, {name: rates_J[:1] for name, rates_J in rates.items()})
        clip_jobs(wave, None)
        for name, own, group in zip(names, parameters, oracle.param_groups, strict=True):
            group["lr"] = rates[group["name"]][0].item()
            gradients = parts(name, wave.get_parameter(name).grad)
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient.clone()
        oracle.step()
        optimizer.step()
    for (name, found), own in zip(tensors_of(wave).items(), parameters, strict=True):
        for part, expected in zip(parts(name, found), own, strict=True):
            torch.testing.assert_close(part, expected.data, rtol=1e-10, atol=1e-12)


# --- jobs that diverge


@each_shape
@pytest.mark.parametrize(
    ("value", "clip_norm"),
    [(float("nan"), CLIP_NORM), (float("inf"), None)],
    ids=["nan-clipped", "inf-not-clipped"],
)
def test_a_job_whose_gradient_is_no_number_leaves_the_others_bit_for_bit(
    kind, optim, value, clip_norm
):
    def spoil(step, gradients):
        if step == 5:
            next(iter(gradients[1].values())).view(-1)[2] = value

    alones, clean, optimizer = start(kind, optim)
    run_wave(clean, optimizer, alones, range(N_JOBS), range(STEPS), clip_norm=clip_norm)
    alones, wave, optimizer = start(kind, optim)
    norms_TJ = run_wave(
        wave, optimizer, alones, range(N_JOBS), range(STEPS), clip_norm=clip_norm, spoil=spoil
    )
    assert (~norms_TJ.isfinite()).nonzero().tolist() == [[5, 1]]
    for job in (0, 2):
        assert_same(slices(wave, job), slices(clean, job))
    assert all(tensor.isfinite().all() for tensor in tensors_of(wave).values())


@each_shape
def test_a_job_at_rate_zero_stays_bit_for_bit(kind, optim):
    alones, wave, optimizer = start(kind, optim)
    run_wave(wave, optimizer, alones, range(N_JOBS), range(3))
    before = slices(wave, 1)
    rates = {name: rates_J.clone() for name, rates_J in draw_rates(N_JOBS, 3).items()}
    for rates_J in rates.values():
        rates_J[1] = 0.0
    set_job_rates(optimizer, rates)
    optimizer.step()
    assert_same(slices(wave, 1), before)


# --- compaction, saving, loading


@each_shape
def test_the_jobs_that_are_left_go_on_in_a_smaller_wave_bit_for_bit(kind, optim):
    left = [2, 0]
    alones, wave, optimizer = start(kind, optim)
    run_wave(wave, optimizer, alones, range(N_JOBS), range(6))
    halves = [make_alone(kind, job) for job in left]
    for half, job in zip(halves, left, strict=True):
        for name, tensor in slices(wave, job).items():
            half.get_parameter(name).data.copy_(tensor)
    smaller = make_wave(halves)
    its_optimizer = make_job_optimizer(smaller, optim)
    take_jobs(optimizer, left, its_optimizer)
    run_wave(wave, optimizer, alones, range(N_JOBS), range(6, STEPS))
    run_wave(smaller, its_optimizer, alones, left, range(6, STEPS))
    for number, job in enumerate(left):
        assert_same(slices(smaller, number), slices(wave, job))


@each_shape
def test_a_job_s_state_is_named_and_shaped_as_that_of_the_job_alone(kind, optim):
    alones, wave, optimizer = start(kind, optim)
    run_wave(wave, optimizer, alones, range(N_JOBS), range(6))
    tensors, numbers = job_state(wave, optimizer, 1)
    single = make_optimizer(alones[1], optim)
    run_alone(alones[1], 1, optim, steps=range(6), optimizer=single)
    expected, expected_numbers = checkpoint.optimizer_state(alones[1], single)
    assert numbers == expected_numbers
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name])
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of the whole wave


@each_optimizer
def test_states_before_the_first_step_are_empty_and_can_be_loaded(kind, optim):
    alones, wave, optimizer = start(kind, optim)
    states = [job_state(wave, optimizer, job) for job in range(N_JOBS)]
    assert states == [({}, {})] * N_JOBS
    load_job_states(wave, optimizer, states, places=PLACES)
    run_wave(wave, optimizer, alones, range(N_JOBS), range(2))


@each_optimizer
def test_jobs_of_different_steps_make_no_wave(kind, optim):
    alones, wave, optimizer = start(kind, optim)
    run_wave(wave, optimizer, alones, range(N_JOBS), range(2))
    states = [job_state(wave, optimizer, job) for job in range(N_JOBS)]
    run_wave(wave, optimizer, alones, range(N_JOBS), range(2, 3))
    states[2] = job_state(wave, optimizer, 2)
    with pytest.raises(RunError, match="different steps"):
        load_job_states(wave, optimizer, states, places=PLACES)


def test_states_of_other_tensors_are_refused():
    alones, wave, optimizer = start("MHR", OptimConfig())
    run_wave(wave, optimizer, alones, range(N_JOBS), range(2))
    states = [job_state(wave, optimizer, job) for job in range(N_JOBS)]
    _, routing_only, its_optimizer = start("routing only", OptimConfig())
    with pytest.raises(RunError, match=r"inventory.A_12x8.*\['routing_logits'\] train"):
        load_job_states(routing_only, its_optimizer, states, places=PLACES)


# --- what it costs


def record_step(n_jobs, kind, optim):
    _, wave, optimizer = start(kind, optim, n_jobs=n_jobs)
    for parameter in wave.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Recorder() as recorder:
        set_job_rates(optimizer, draw_rates(n_jobs, 1))
        clip_jobs(wave, CLIP_NORM)
        optimizer.step()
    return recorder.operations


@each_shape
def test_more_jobs_take_no_more_operations(kind, optim):
    assert record_step(8, kind, optim) == record_step(2, kind, optim)


@each_shape
def test_a_step_never_waits_for_the_device(kind, optim):
    """Nothing can be read from tensors of the device `meta`."""
    wave = make_wave([make_alone(kind, job) for job in range(N_JOBS)]).to("meta")
    optimizer = make_job_optimizer(wave, optim)
    for parameter in wave.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    set_job_rates(optimizer, draw_rates(N_JOBS, 1))
    assert clip_jobs(wave, CLIP_NORM).shape == (N_JOBS,)
    optimizer.step()


# --- the groups


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("MHR", ["inventory", "routing"]),
        ("LoRA", ["inventory"]),
        ("uniform", ["inventory"]),
        ("routing only", ["routing"]),
    ],
)
def test_there_are_groups_for_what_trains(kind, names):
    _, _, optimizer = start(kind, OptimConfig())
    assert [group["name"] for group in optimizer.param_groups] == names


def test_until_rates_are_set_every_job_has_the_peak_rates():
    _, _, optimizer = start("MHR", OptimConfig(lr=0.5, routing_lr=0.25))
    rates = {group["name"]: group["lr"].flatten().tolist() for group in optimizer.param_groups}
    assert rates == {"inventory": [0.5] * N_JOBS, "routing": [0.25] * N_JOBS}


def test_jobs_cannot_train_a_shared_inventory():
    wave = Adapter(CONFIGS["MHR"], SITES, task_names=["one", "two"])
    with pytest.raises(AssertionError, match="shared inventory"):
        make_job_optimizer(wave, OptimConfig())


def test_jobs_cannot_have_sparse_routing_gradients():
    config = replace(CONFIGS["MHR"], private=True)
    wave = Adapter(config, SITES, task_names=["one", "two"], row_gradients=True)
    with pytest.raises(AssertionError, match="jobs move their own rows"):
        make_job_optimizer(wave, OptimConfig())
