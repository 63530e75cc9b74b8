"""An order of tasks in which similar ones stand side by side."""

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform


def clustered_order(cosines: NDArray[np.float64]) -> list[int]:
    """Leaves of an average-linkage clustering by 1 - cosine, neighbours as near as they can be.

    One or two tasks keep their order.
    """
    if len(cosines) < 3:
        return list(range(len(cosines)))
    distances = np.clip(1.0 - cosines, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    return [int(leaf) for leaf in leaves_list(tree)]
