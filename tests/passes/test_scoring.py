"""Packed ranking and batched generation against one example at a time; batches lose no row."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters.tiny import make_t5, randomise
from placed import place_model
from torch.nn import functional as F

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.errors import DataError, DivergenceError
from mhr_scale.families.encoder_decoder import shut_between
from mhr_scale.families.packed import IGNORE, EncodedRow
from mhr_scale.families.t5 import GATED
from mhr_scale.passes.losses import tfew
from mhr_scale.passes.scoring import generate_answers, rank_choices, score
from mhr_scale.rows.batching import cut_batches, deal

TASKS = ("copy", "reverse", "sort")
CONFIGS = {
    "Poly": AdapterConfig(n_skills=3, rank=2),
    "MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2),
    "wide": AdapterConfig(n_skills=3, n_splits=2, rank=16),
    "random": AdapterConfig(n_skills=3, rank=2, policy="random"),
    "ia3": AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4),
}
#: Lengths of the choices of each row.
CHOICES = ((3, 3), (1, 4, 2), (1, 1), (5, 2, 3, 4), (1, 2, 3, 4, 5), (2,), (4, 1))


def make_rows(choices=CHOICES, seed=0):
    """Rows of three tasks in no order, of different lengths; all texts end with token 1."""
    draw = np.random.default_rng(seed)

    def ids(length):
        return np.append(draw.integers(2, 64, length - 1), 1).astype(np.int32)

    return [
        EncodedRow(
            ids(3 + 7 * n % 11),
            tuple(ids(c) for c in lengths),
            task=(2, 0, 1)[n % 3],
            number=10 + n,
        )
        for n, lengths in enumerate(choices)
    ]


def place_adapted(config, *, dtype=torch.float32):
    """A tiny T5 in training mode, and a randomised adapter that is bound to it."""
    model = make_t5().to(dtype).train()
    sites = find_sites(model, config.layout)
    placed = place_model(model, sites)
    adapter = Adapter(config, sites, task_names=TASKS).to(dtype)
    adapter.bind(placed.adapted)
    return placed, randomise(adapter)


@torch.no_grad()
def naive(model, row, *, length_norm):
    """Scores of a row, one choice at a time, nothing padded."""
    scores = []
    for choice in row.answers:
        labels = torch.tensor(choice, dtype=torch.long)[None]
        logits = model(input_ids=torch.tensor(row.input_ids)[None], labels=labels).logits
        nll = F.cross_entropy(logits[0], labels[0], reduction="sum").item()
        scores.append(nll / len(choice) ** length_norm)
    return scores


def flat(scores):
    return [value for row in scores for value in row]


@pytest.mark.parametrize("length_norm", [0.0, 1.0])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_scores_equal_one_choice_at_a_time(config, length_norm):
    placed, adapter = place_adapted(config)
    rows = make_rows()
    found = rank_choices(placed, adapter, rows, length_norm=length_norm)
    model = placed.model.eval()
    wanted = []
    for row in rows:
        with adapter.slots([row.task]):
            wanted.append(naive(model, row, length_norm=length_norm))
    assert [len(scores) for scores in found] == [len(lengths) for lengths in CHOICES]
    assert flat(found) == pytest.approx(flat(wanted), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length_norm", [0.0, 1.0])
def test_packed_scores_of_a_bare_backbone(length_norm, attention):
    model = make_t5().eval()
    model.set_attn_implementation(attention)
    rows = make_rows()
    found = rank_choices(place_model(model), None, rows, length_norm=length_norm)
    wanted = [naive(model, row, length_norm=length_norm) for row in rows]
    assert flat(found) == pytest.approx(flat(wanted), rel=1e-5, abs=1e-5)


def test_the_bare_backbone_under_an_adapter_that_is_off():
    placed, adapter = place_adapted(CONFIGS["MHR"])
    rows = make_rows()
    with adapter.off():
        found = rank_choices(placed, None, rows, length_norm=1.0)
    assert found == rank_choices(place_model(make_t5()), None, rows, length_norm=1.0)


def test_a_hundred_choices_beyond_the_reach_of_the_position_buckets():
    model = make_t5().eval()
    (row,) = make_rows([(1, 2, 3, 4, 5) * 20])
    (found,) = rank_choices(place_model(model), None, [row], length_norm=0.0)
    assert found == pytest.approx(naive(model, row, length_norm=0.0), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        (torch.bfloat16, "try the backbone in float32"),
        (torch.float32, "train the adapter with a lower optim.lr, or check the backbone"),
    ],
)
def test_scores_that_are_no_numbers_come_with_a_way_out_that_is_left(dtype, way_out):
    model = make_t5().eval().to(dtype)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=way_out):
        rank_choices(place_model(model), None, make_rows(), length_norm=1.0)


def test_a_choice_as_long_as_the_last_position_bucket():
    model = make_t5().eval()
    (row,) = make_rows([(140, 3, 150)])
    (found,) = rank_choices(place_model(model), None, [row], length_norm=0.0)
    assert found == pytest.approx(naive(model, row, length_norm=0.0), rel=1e-5)


def test_ranking_runs_the_encoder_once_and_cross_attention_once_per_example():
    model = make_t5().eval()
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append("encoder"))
    cross = model.decoder.block[0].layer[1].EncDecAttention.k
    cross.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    rank_choices(place_model(model), None, make_rows(), length_norm=1.0)
    assert seen == ["encoder", len(CHOICES)]


def test_the_model_trains_on_as_before_and_keeps_no_graph():
    placed, adapter = place_adapted(CONFIGS["MHR"])
    rank_choices(placed, adapter, make_rows(), length_norm=1.0)
    assert all(module.training for module in placed.model.modules())
    placed.model.eval()
    rank_choices(placed, adapter, make_rows(), length_norm=1.0)
    assert not any(module.training for module in placed.model.modules())
    with adapter.slots([0]):  # no slots are left in use
        pass


def test_dropout_is_off_while_scoring():
    placed = place_model(make_t5(dropout_rate=0.5).train())
    rows = make_rows()
    first, second = (rank_choices(placed, None, rows, length_norm=1.0) for _ in range(2))
    assert first == second


def pack(*answers):
    rows = [EncodedRow((3, 1), choices) for choices in answers]
    return GATED.pack(rows, SimpleNamespace(pad_token_id=0, decoder_start_token_id=9))


def test_choices_are_packed_side_by_side():
    packed = pack(((5, 6, 1), (7, 1)), ((8, 1),))
    assert packed.inputs["decoder_input_ids"].tolist() == [[9, 5, 6, 9, 7], [9, 8, 0, 0, 0]]
    assert packed.labels_BD.tolist() == [[5, 6, 1, 7, 1], [8, 1, IGNORE, IGNORE, IGNORE]]
    assert packed.choices_BD.tolist() == [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]
    assert (packed.starts, packed.n_choices) == (((0, 3), (0,)), 2)


def test_a_choice_sees_its_own_earlier_tokens_and_no_other_choice():
    packed = pack(((5, 6, 1), (7, 1)))
    is_open = shut_between(packed.choices_BD, torch.float32)[0, 0] == 0.0
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert is_open.int().tolist() == wanted


@torch.no_grad()
def test_training_ranks_packed_choices_by_the_scores_of_evaluation():
    placed = place_model(make_t5().eval())
    question = make_rows()[0].input_ids
    rows = [replace(row, input_ids=question) for row in make_rows()]
    packed = placed.pack(rows)
    logits = placed.model(
        input_ids=torch.tensor(np.array([row.input_ids for row in rows])),
        decoder_input_ids=packed.inputs["decoder_input_ids"],
        decoder_attention_mask=shut_between(packed.choices_BD, torch.float32),
    ).logits
    labels = torch.zeros(len(rows), dtype=torch.long)
    losses = tfew(logits, packed.labels_BD, packed.choices_BD, labels, n_choices=packed.n_choices)
    found = losses.scores_BC[losses.scores_BC.isfinite()].tolist()
    assert found == pytest.approx(flat(rank_choices(placed, None, rows, length_norm=1.0)), rel=1e-5)


def test_rows_that_cannot_be_ranked():
    with pytest.raises(DataError, match="row 3: an answer has no tokens"):
        EncodedRow(np.array([1]), (np.array([1]), np.array([])), number=3)
    row = EncodedRow(np.array([1]), number=3)
    with pytest.raises(DataError, match="row 3: no choices"):
        rank_choices(place_model(make_t5()), None, [row], length_norm=1.0)


@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        (torch.float32, "train the adapter with a lower optim.lr"),
        (torch.bfloat16, "try the backbone in float32"),
    ],
)
def test_scores_that_are_no_numbers_stop_the_job(dtype, way_out):
    model = make_t5().to(dtype)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=f"row 10: the scores .* are not finite; {way_out}"):
        rank_choices(place_model(model), None, make_rows(), length_norm=1.0)


# -- generation ----------------------------------------------------------------------------------


class Numbers:
    """A tokenizer whose words are token ids."""

    def batch_decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return [" " + " ".join(str(token) for token in row if token > 1) + " " for row in ids]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("config", [CONFIGS["MHR"], CONFIGS["ia3"]], ids=["MHR", "ia3"])
def test_answers_of_a_batch_equal_those_of_each_example(config, beams):
    placed, adapter = place_adapted(config, dtype=torch.float64)
    options = {"tokenizer": Numbers(), "beams": beams, "max_new_tokens": 6}
    rows = make_rows()
    together = generate_answers(placed, adapter, rows, **options)
    apart = [generate_answers(placed, adapter, [row], **options)[0] for row in rows]
    assert together == apart
    assert len(set(together)) > 1
    assert all(len(text.split()) <= 6 for text in together)
    assert all(text == text.strip() for text in together)


def test_answers_of_the_bare_backbone():
    placed, adapter = place_adapted(CONFIGS["MHR"])
    options = {"tokenizer": Numbers(), "beams": 1, "max_new_tokens": 6}
    rows = make_rows()
    with adapter.off():
        found = generate_answers(placed, None, rows, **options)
    assert found == generate_answers(place_model(make_t5()), None, rows, **options)


# -- batches and jobs ----------------------------------------------------------------------------


def random_rows(n_rows, seed=0):
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(n_rows):
        task = int(draw.integers(5))
        input_ids = np.ones(draw.integers(1, 60), dtype=np.int32)
        answers = tuple(np.ones(draw.integers(1, 9)) for _ in range(draw.integers(0, 6)))
        rows.append(EncodedRow(input_ids, answers, task=task, number=number))
    return rows


@pytest.mark.parametrize("max_tokens", [1, 100, 1000, 10**6])
def test_batches_hold_every_row_once_within_their_tokens(max_tokens):
    rows = random_rows(83)
    batches = cut_batches(rows, max_tokens=max_tokens)
    assert sorted(row.number for batch in batches for row in batch) == list(range(83))
    for batch in batches:
        inputs = -(-max(len(row.input_ids) for row in batch) // 8) * 8
        tokens = len(batch) * (inputs + max(row.n_answer_tokens for row in batch))
        assert tokens <= max_tokens or len(batch) == 1
        assert [row.task for row in batch] == sorted(row.task for row in batch)
    longest = [max(len(row.input_ids) for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_do_not_depend_on_the_order_of_the_rows():
    rows = random_rows(40)
    assert cut_batches(rows, max_tokens=300) == cut_batches(rows[::-1], max_tokens=300)
    assert cut_batches([], max_tokens=300) == []


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 50])
def test_ranks_share_the_batches_and_make_as_many_rounds(world_size, is_sharded):
    batches = cut_batches(random_rows(83), max_tokens=300)
    hands = [deal(batches, rank, world_size, is_sharded=is_sharded) for rank in range(world_size)]
    assert {len(hand) for hand in hands} == {-(-len(batches) // world_size)}
    numbers = [row.number for hand in hands for batch, counts in hand if counts for row in batch]
    assert sorted(numbers) == list(range(83))
    idle = [batch for hand in hands for batch, counts in hand if not counts]
    assert all((batch is not None) == is_sharded for batch in idle)
    assert deal([], 0, world_size, is_sharded=is_sharded) == []


def fake_engine(rank, world_size, *, is_sharded):
    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        is_sharded=is_sharded,
        gather_objects=lambda value: [value],
    )


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_job_of_three_ranks_gives_each_row_one_result(is_sharded):
    rows, found, calls = random_rows(50), {}, []
    for rank in range(3):
        ran = []

        def run(batch, ran=ran):
            ran.append(len(batch))
            return [row.number * 2 for row in batch]

        engine = fake_engine(rank, 3, is_sharded=is_sharded)
        for results in score(cut_batches(rows, max_tokens=250), run, engine=engine):
            assert not results.keys() & found.keys()
            found |= results
        calls.append(len(ran))
    assert found == {number: number * 2 for number in range(50)}
    n_batches = len(cut_batches(rows, max_tokens=250))
    assert n_batches % 3
    assert calls == [-(-n_batches // 3)] * 3 if is_sharded else sum(calls) == n_batches


def test_an_interrupted_job_goes_on_with_the_rows_that_are_left():
    placed, adapter = place_adapted(CONFIGS["MHR"])
    run = partial(rank_choices, placed, adapter, length_norm=1.0)
    engine = fake_engine(0, 1, is_sharded=False)
    rows = make_rows()

    def batches(rows):
        return cut_batches(rows, max_tokens=60)

    whole = {k: v for part in score(batches(rows), run, engine=engine) for k, v in part.items()}
    assert set(whole) == {row.number for row in rows}
    done = dict(next(score(batches(rows), run, engine=engine)))
    assert 0 < len(done) < len(rows)
    left = [row for row in rows if row.number not in done]
    for part in score(batches(left), run, engine=engine):
        done |= part
    assert done.keys() == whole.keys()
    for number, scores in whole.items():
        assert done[number] == pytest.approx(scores, rel=1e-5)
