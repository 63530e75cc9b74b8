"""Orders of similar tasks."""

import numpy as np
import pytest

from mhr_scale.analysis.routing_statistics import clustered_order


def test_similar_tasks_stand_side_by_side() -> None:
    kinds = np.array([0, 1, 0, 1, 2, 0, 2])
    cosines = np.where(kinds[:, None] == kinds, 0.9, -0.1)
    np.fill_diagonal(cosines, 1.0)
    order = clustered_order(cosines)
    assert sorted(order) == list(range(7))
    assert sum(kinds[order][1:] != kinds[order][:-1]) == 2


def test_neighbours_in_a_chain_stay_neighbours() -> None:
    places = np.array([3.0, 0.0, 4.0, 1.0, 2.0])
    order = clustered_order(1.0 - np.abs(places[:, None] - places) / 5.0)
    assert list(places[order]) in ([0.0, 1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("n_tasks", [0, 1, 2, 3, 20])
def test_tasks_that_are_all_the_same_have_an_order_too(n_tasks: int) -> None:
    assert sorted(clustered_order(np.ones((n_tasks, n_tasks)))) == list(range(n_tasks))
