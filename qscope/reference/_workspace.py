"""Scores are computed and ranked a block of rows at a time, so that the workspace does not grow with N."""

WORKSPACE_BYTES = 64 << 20


def rows_per_block(d_sae: int, itemsize: int) -> int:
    """How many rows of d_sae elements of itemsize bytes fit in the workspace; at least one."""
    return max(1, WORKSPACE_BYTES // max(1, d_sae * itemsize))
