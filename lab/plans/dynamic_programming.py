"""Dynamic programming over the calls of a run: the best full steps, or the best timesteps."""

import numpy as np


def best_marks(costs: np.ndarray, most: int) -> list[list[int]]:
    """The calls of a run to mark at the least total cost, for each number of marks from 1 to `most`.

    costs: [i, j, k], [calls + 1, calls, calls + 1]: from the marked call j to the next one k (k = calls: the end), if i
    is the mark before j (i = calls: none). The first call is always marked. The state is the last two marks.
    """
    calls = costs.shape[1]
    cost = np.full((calls + 1, calls), np.inf)          # the least cost with marks ..., i, j so far
    cost[calls, 0] = 0.0
    before: list[np.ndarray] = []
    found = []
    for _ in range(min(most, calls)):
        ends = cost + costs[:, :, calls]
        i, j = np.unravel_index(int(ends.argmin()), ends.shape)
        marks = [int(j)]
        for back in reversed(before):
            marks.append(int(i))
            i, j = back[i, j], i
        found.append(marks[::-1])
        reached = cost[:, :, None] + costs[:, :, :calls]                     # [i, j, k]
        before.append(reached.argmin(0))                                    # [j, k] -> i
        cost = np.full_like(cost, np.inf)
        cost[:calls] = reached.min(0)
    return found
