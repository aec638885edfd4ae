"""The loop of `statistics.column_sums`, compiled by numba. Imported only where numba is installed."""

import numpy as np

from mistudio.store.gather_kernels import compiled


@compiled()
def add_column_sums(values, rows_at_once, sums):
    """sums[0] += Σ values, sums[1] += Σ values²: the same numbers in the same order as `statistics.column_sums`."""
    part = np.empty_like(sums)
    for start in range(0, len(values), rows_at_once):
        part[:] = 0
        for row in range(start, min(start + rows_at_once, len(values))):
            for d in range(values.shape[1]):
                number = np.float64(values[row, d])
                part[0, d] += number
                part[1, d] += number * number
        sums += part
