"""What sparse_grads.py launches for a [N, K] batch, with the launcher's own configurations."""

from collections.abc import Iterator

from aot import Spec
from qscope_kernels import sparse_grads as kernels

N, D = 8192, 4096
# Per architecture: dtypes of g and x, and whether D divides by 16.
VARIANTS = {
    80: (("bf16", "bf16", True), ("fp32", "fp32", True)),
    89: (("fp32", "bf16", True),),
    90: (("bf16", "bf16", True), ("fp32", "bf16", True), ("fp32", "fp32", True), ("fp32", "bf16", False)),
}
BYTES = {"bf16": 2, "fp32": 4}


def specs(arch: int) -> Iterator[Spec]:
    for g, x, aligned in VARIANTS[arch]:
        yield from _pair(g, x, aligned)
    for dtype in ("bf16", "fp32"):
        yield Spec(
            f"_column_sum_kernel-{dtype}",
            kernels._column_sum_kernel,
            types=dict(g_ptr=f"*{dtype}", part_ptr="*fp32", N="i32", D="i32", rows="i32"),
            constexprs={"ROWS": 32, "BLOCK_D": 256 // BYTES[dtype]},
            options={"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
            divisible=("N", "D", "rows"),
            registers=128,
            wide_loads=4,  # a tile of 32 rows x 256 bytes over 128 threads
        )


def _pair(g: str, x: str, aligned: bool) -> Iterator[Spec]:
    cfg = kernels.grads_config(N, D if aligned else D - 3, max(BYTES[g], BYTES[x]))
    constexprs = {"CHUNK": cfg.chunk, "BLOCK_D": cfg.block_d, "UNROLL": cfg.unroll}
    lists = dict(tokens_ptr="*i32", acts_ptr="*fp32", grads_ptr="*fp32", offsets_ptr="*i64")
    tables = dict(chunk_feature_ptr="*i64", first_chunk_ptr="*i64")
    rows = dict(g_ptr=f"*{g}", x_ptr=f"*{x}")
    result = dict(dec_ptr="*fp32", enc_ptr="*fp32", bias_ptr="*fp32")
    # Per entry one piece of g and one of x; a lane's piece of the narrower dtype is 8 bytes, a load of 64 bits.
    wide = sum(cfg.block_d * BYTES[t] // (16 * 32) for t in (g, x)) * cfg.unroll
    for name, types in (
        ("_sparse_grads_kernel", lists | rows | result | dict(D="i32")),
        ("_sparse_grads_split_kernel", lists | tables | rows | result | dict(F="i32", D="i32")),
    ):
        yield Spec(
            f"{name}-{g}-{x}{'' if aligned else '-oddD'}",
            getattr(kernels, name),
            types=types,
            constexprs=constexprs,
            options=cfg.options() | {"maxnreg": kernels.REGISTERS},
            divisible=("F", "D") if aligned else (),
            registers=72 if aligned else 80,
            wide_loads=wide if aligned else 0,
            in_flight=wide if aligned else 0,
        )
