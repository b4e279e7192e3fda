"""What feature_stats.py launches: one group and several, few contexts and many."""

from collections.abc import Iterator

from aot import Spec
from qscope_kernels import feature_stats as kernels

I32, I64, F32, F64 = "*i32", "*i64", "*fp32", "*fp64"


def specs(arch: int) -> Iterator[Spec]:
    cfg = kernels.LaunchConfig()
    for dtype, G in (("bf16", 1), ("fp32", 4)):
        # Triton makes a constant of an argument that is 1, and of no other.
        one, more = ({"G": 1}, {}) if G == 1 else ({}, {"G": "i32"})
        cells = dict(acts_ptr=f"*{dtype}", indices_ptr=I32, groups_ptr=I32, cells_ptr=I32)
        yield Spec(
            f"_cells_kernel-{dtype}-{G}",
            kernels._cells_kernel,
            types=cells | dict(entries="i32", K="i32", cells="i32", F="i32") | more,
            constexprs={"HAS_GROUPS": G > 1, "BLOCK": 1024} | one,
            options=cfg.options(4),
            divisible=("entries", "cells", "F"),
            registers=64,
        )
        tables = dict(count_ptr=I64, total_ptr=F64, total_sq_ptr=F64, peak_ptr=F32)
        yield Spec(
            f"_feature_sums_kernel-{dtype}-{G}",
            kernels._feature_sums_kernel,
            types=dict(values_ptr=f"*{dtype}", offsets_ptr=I64) | tables | dict(cells="i32", F="i32") | more,
            constexprs={"BLOCK": cfg.cells, "UNROLL": cfg.unroll} | one,
            options=cfg.options(),
            divisible=("cells", "F"),
            registers=64,
        )
        for M in (8, 32, 64):
            lists = dict(values_ptr=f"*{dtype}", order_ptr=I64, offsets_ptr=I64, first_token_ptr=I64)
            yield Spec(
                f"_feature_top_kernel-{dtype}-{G}-{M}",
                kernels._feature_top_kernel,
                types=lists | dict(top_values_ptr=F32, top_tokens_ptr=I64, K="i32") | more | dict(M="i32"),
                constexprs={"BLOCK_M": M, "CHUNK": cfg.chunk} | one,
                options=cfg.options(max(1, M // cfg.slots)),
                divisible=("M",) if M % 16 == 0 else (),
                # Ampere compares 64 x 32 pairs of 64-bit tokens in more registers; no GPU measured what that costs.
                registers=128 if arch >= 90 else 200,
            )
