"""The line that `qscope store` ends with."""

from qscope.workflows.store import StoreResult


def render(result: StoreResult) -> str:
    """What was checked or written."""
    size = f"{result.tokens:,} tokens in {result.shards} shards"
    if result.action == "verify":
        return f"{result.store}: {size}, every checksum is right"
    return f"{result.store}: {size} written to {result.out}"
