"""A backbone family with other names than T5's is one object in the table."""

import copy

import pytest
import torch
from adapters.tiny import TASKS, attach_copy, gradients, logits, make_batch, randomise, tensors_of
from mine import FAMILY, make_mine
from placed import place_model
from torch.func import functional_call

from mhr_scale import AdapterConfig, attach, average, collapse, load_adapter, save_adapter
from mhr_scale.adapters import detach, find_sites, peft_folders
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.sites import recognise_sites
from mhr_scale.engine.gradients import order_gradients
from mhr_scale.errors import AdapterError, LayoutError
from mhr_scale.families import table
from mhr_scale.families.packed import EncodedRow

LAYOUTS = tuple(FAMILY.layouts)
TASK_IDS = (2, 0, 2, 1)
MHR = AdapterConfig(rank=2, n_skills=3, n_splits=4)


@pytest.fixture(autouse=True)
def _family(monkeypatch):
    """The table with one family more."""
    monkeypatch.setattr(table, "FAMILIES", (*table.FAMILIES, FAMILY))


def config_of(name, **changes):
    return AdapterConfig(**{"rank": 2, "n_skills": 3, "n_splits": 4, "layout": name, **changes})


def bare_logits(model):
    with torch.no_grad():
        return model(**make_batch(len(TASK_IDS))).logits


@pytest.mark.parametrize(
    ("name", "count"),
    # 2 encoder layers of one attention, 3 decoder layers of two
    [("full", 2 * 6 + 3 * 10), ("light", 2 * 3 + 3 * 5), ("attention", 2 * 4 + 3 * 8)],
)
def test_a_layout_finds_its_linears(name, count):
    sites = find_sites(make_mine(), name)
    assert len(sites) == count
    assert {site.name.rpartition(".")[2] for site in sites} == set(FAMILY.layouts[name])


def test_a_site_knows_where_it_sits():
    sites = {site.name: site for site in find_sites(make_mine(), "full")}
    site = sites["decoder.layers.1.fc2"]
    assert (site.stack, site.block, site.sublayer) == ("decoder", 1, 2)
    assert (site.in_features, site.out_features) == (48, 32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sites_are_recognised_without_the_model_in_its_own_order(name):
    sites = find_sites(make_mine(), name)
    widths = {site.name: (site.in_features, site.out_features) for site in reversed(sites)}
    assert recognise_sites(widths) == (Layout(name), sites)


def test_a_linear_that_is_missing_names_both_counts():
    model = make_mine()
    model.decoder.layers[2].fc1 = torch.nn.Identity()
    with pytest.raises(LayoutError, match=r"'full' matches 41 .* with 2\+3 blocks, expected 42"):
        find_sites(model, "full")


@pytest.mark.parametrize("granularity", ["linear", "sublayer", "block", "stack", "model"])
def test_routing_is_shared_by_place(granularity):
    adapter = attach(make_mine(), config_of("full", granularity=granularity), tasks=TASKS)
    groups = {"linear": 42, "sublayer": 2 * 2 + 3 * 3, "block": 5, "stack": 2, "model": 1}
    assert len(adapter.groups) == groups[granularity]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_new_adapter_is_the_backbone(name, kind):
    model = make_mine()
    expected = bare_logits(model)
    adapter = attach(model, config_of(name, kind=kind), tasks=TASKS)
    torch.testing.assert_close(logits(model, adapter, TASK_IDS), expected, rtol=0, atol=2e-5)
    with adapter.off():
        assert torch.equal(bare_logits(model), expected)
    detach(model)
    assert torch.equal(bare_logits(model), expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_adapter_is_its_update_added_to_the_weights(name):
    model = make_mine().double()
    merged = copy.deepcopy(model)
    config = config_of(name, n_skills=1, n_splits=1, alpha=3.0)
    adapter = randomise(attach(model, config, tasks=("a",)).double())
    tensors = dict(adapter.inventory.named_tensors())
    for site in adapter.sites:
        update = tensors[f"{site.name}.A"][0, 0] @ tensors[f"{site.name}.B"][0, 0] * 1.5
        merged.get_submodule(site.name).weight.data += update.T
    torch.testing.assert_close(logits(model, adapter, [0] * 4), bare_logits(merged))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_the_update_added_to_the_weights(name):
    model = make_mine().double()
    merged = copy.deepcopy(model).requires_grad_(False)
    config = config_of(name, n_skills=1, n_splits=1)
    adapter = randomise(attach(model, config, tasks=("a",)).double())
    tensors = {n: t.clone().requires_grad_() for n, t in adapter.inventory.named_tensors()}
    weights = {}
    for site in adapter.sites:
        update = tensors[f"{site.name}.A"][0, 0] @ tensors[f"{site.name}.B"][0, 0] / 2
        weights[f"{site.name}.weight"] = merged.get_submodule(site.name).weight + update.T
    batch = make_batch(4)
    functional_call(merged, weights, kwargs=batch).loss.backward()
    with adapter.slots([0] * 4) as slots:
        slots.backward(model(**batch).loss)
    for parameter in adapter.parameters():  # read them through the names of the linears
        parameter.data = parameter.grad
    found = dict(adapter.inventory.named_tensors())
    assert found.keys() == tensors.keys()
    for tensor_name, tensor in tensors.items():
        torch.testing.assert_close(found[tensor_name], tensor.grad, msg=tensor_name)
    own = {id(parameter) for parameter in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_it_trains():
    model = make_mine()
    adapter = attach(model, MHR, tasks=TASKS)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    losses = []
    for _ in range(15):
        with adapter.slots(TASK_IDS) as slots:
            loss = model(**make_batch(len(TASK_IDS))).loss
            slots.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_average_is_the_mean_of_the_inventory():
    model = make_mine().double()
    adapter = randomise(attach(model, MHR, tasks=TASKS).double())
    mean = average(adapter)
    tensors, whole = (dict(one.inventory.named_tensors()) for one in (mean, adapter))
    name = "decoder.layers.0.cross_attn.value.B"
    expected = whole[name].mean(1).permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(tensors[name][0, 0], expected.to(tensors[name].dtype))


def test_one_task_s_own_adapter_gives_that_task_s_logits():
    model = make_mine().double()
    adapter = randomise(attach(model, config_of("full", n_splits=1), tasks=TASKS).double())
    expected = logits(model, adapter, [2] * 4)
    detach(model)
    single = attach_copy(model, collapse(adapter, "sort"))
    torch.testing.assert_close(logits(model, single, [0] * 4), expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_saved_adapter_is_loaded_to_the_same_logits(tmp_path, name):
    model = make_mine()
    adapter = randomise(attach(model, config_of(name), tasks=TASKS))
    expected = logits(model, adapter, TASK_IDS)
    save_adapter(adapter, tmp_path)
    fresh = make_mine()
    loaded = load_adapter(tmp_path, model=fresh)
    assert torch.equal(logits(fresh, loaded, TASK_IDS), expected)
    assert load_adapter(tmp_path).sites == adapter.sites


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path):
    save_adapter(attach(make_mine(decoder_layers=4), MHR, tasks=TASKS), tmp_path)
    with pytest.raises(AdapterError, match=r"made for another backbone: decoder\.layers\.3"):
        load_adapter(tmp_path, model=make_mine())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["lora", "ia3", "poly"])
def test_peft_folders_are_written_and_read_back(tmp_path, name, kind):
    single = {"n_skills": 1, "n_splits": 1, "rank": 2 if kind == "lora" else 1}
    config = config_of(name, **({} if kind == "poly" else {"kind": kind, **single}))
    adapter = randomise(attach(make_mine(), config, tasks=TASKS))
    write = getattr(peft_folders, f"write_peft_{kind}")
    write(adapter, tmp_path, base_model=None)
    card, found = peft_folders.open_adapter(tmp_path)
    assert card.sites == adapter.sites
    assert found.config == config
    ours = tensors_of(adapter)
    torch.testing.assert_close(tensors_of(found), ours)


# -- what passes ask of a family -------------------------------------------------------------------


def rows_of(*answer_lengths):
    """Rows of other lengths; a list of lengths for the answers of each."""
    generator = torch.Generator().manual_seed(5)

    def ids(length):
        return tuple(torch.randint(2, 64, (length,), generator=generator).tolist())

    return [
        EncodedRow(ids(4 + 3 * number), tuple(map(ids, lengths)), number=number)
        for number, lengths in enumerate(answer_lengths)
    ]


def alone(model, row, answer):
    """Logits of one answer to an unpadded row, by the model itself."""
    inputs, labels = torch.tensor([row.input_ids]), torch.tensor([answer])
    return model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels).logits[0]


@torch.no_grad()
def test_logits_of_packed_rows_are_the_model_s_own():
    placed = place_model(make_mine().double())
    rows = rows_of([2], [5], [3])
    packed = placed.pack(rows)
    logits_BDV = placed.logits(packed)
    for row, labels_D, logits_DV in zip(rows, packed.labels_BD, logits_BDV, strict=True):
        (answer,) = row.answers
        assert labels_D[labels_D >= 0].tolist() == list(answer)
        torch.testing.assert_close(logits_DV[: len(answer)], alone(placed.model, row, answer))


@torch.no_grad()
def test_answers_side_by_side_see_themselves_alone():
    model = make_mine().double()
    model.places.weight.zero_()  # where positions count by their number they would not
    placed = place_model(model)
    rows = rows_of([2, 4, 1], [3], [1, 5])
    packed = placed.pack(rows)
    logits_BDV = placed.logits(packed)
    for row, starts, logits_DV in zip(rows, packed.starts, logits_BDV, strict=True):
        for start, answer in zip(starts, row.answers, strict=True):
            found = logits_DV[start : start + len(answer)]
            torch.testing.assert_close(found, alone(model, row, answer))


@torch.no_grad()
def test_states_are_those_of_what_reads_the_inputs():
    placed = place_model(make_mine().double())
    rows = rows_of([2], [5], [3])
    states_BLH, mask_BL = FAMILY.states(placed.model, placed.pack(rows))
    for row, states_LH, mask_L in zip(rows, states_BLH, mask_BL, strict=True):
        inputs = torch.tensor([row.input_ids])
        own = placed.model.get_encoder()(inputs, torch.ones_like(inputs)).last_hidden_state[0]
        torch.testing.assert_close(states_LH[mask_L.bool()], own)


def test_gradients_are_summed_in_order_at_its_blocks_and_norms():
    model = make_mine()
    adapter = randomise(attach(model, MHR, tasks=TASKS))
    before = logits(model, adapter, TASK_IDS), gradients(model, adapter, TASK_IDS)
    order_gradients(model, FAMILY)
    hooked = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    blocks = {f"encoder.layers.{n}" for n in range(2)} | {f"decoder.layers.{n}" for n in range(3)}
    norms = {name for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert hooked == blocks | norms
    assert torch.equal(logits(model, adapter, TASK_IDS), before[0])
    torch.testing.assert_close(gradients(model, adapter, TASK_IDS), before[1], rtol=1e-4, atol=1e-6)
