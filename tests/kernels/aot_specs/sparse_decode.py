"""What sparse_decode.py launches for a [N, K] batch, with the launchers' own configurations."""

from collections.abc import Iterator
from dataclasses import replace

from aot import Spec
from qscope_kernels import sparse_decode as kernels

# N, F, D as in Qwen-Scope's 8B shape. They choose the launch; only whether D divides by 16 reaches the compiler.
N, F, D = 8192, 65536, 4096
# Per architecture: dtype of the matrices, and whether D divides by 16.
VARIANTS = {
    80: (("bf16", True), ("fp32", True)),
    89: (("bf16", True),),
    90: (("bf16", True), ("fp32", True), ("bf16", False)),
}
# 128-bit loads of rows per lane in one unrolled step, for every launch configuration.
LOADS = 8
# Blocks of one warp that an SM keeps resident; more registers than its share of 65,536 would lose some of them.
RESIDENT = {80: 32, 89: 24, 90: 32}


def specs(arch: int) -> Iterator[Spec]:
    for dtype, aligned in VARIANTS[arch]:
        full = 65536 // (32 * RESIDENT[arch])
        for spec in (*_gathers(dtype, aligned), *_outer(dtype, aligned)):
            yield replace(spec, registers=max(spec.registers, full) if aligned else 255)


def _spec(kernel: str, dtype: str, aligned: bool, cfg: kernels.LaunchConfig, gathers: int = 0, **rest) -> Spec:
    rest = {"options": cfg.options(), "registers": 0} | rest
    # One warp per program hides latency by its own independent loads: at least half of the 8 rows are requested in one
    # go. ptxas may place the first sums between two halves; with four warps per program it left 2.
    return Spec(
        f"{kernel}-{dtype}{'' if aligned else '-oddD'}",
        getattr(kernels, kernel),
        divisible=("N", "D", "F", "size") if aligned else (),
        wide_loads=gathers if aligned else 0,
        in_flight=LOADS // 2 if gathers and aligned else 0,
        **rest,
    )


def _gathers(dtype: str, aligned: bool) -> Iterator[Spec]:
    floats, f32, i32 = f"*{dtype}", "*fp32", "*i32"
    cfg = kernels.launch_config(F, D if aligned else D - 3, 2 if dtype == "bf16" else 4)
    shape = {"BLOCK_D": cfg.block_d, "UNROLL": cfg.unroll}
    decode = dict(acts_ptr=floats, indices_ptr=i32, W_ptr=floats, b_ptr=floats, y_ptr=floats, F="i32", K="i32", D="i32")
    yield _spec("_sparse_decode_fwd_kernel", dtype, aligned, cfg, LOADS + 1, types=decode,
                constexprs={"HAS_BIAS": True} | shape)  # fmt: skip
    dot = dict(g_ptr=floats, indices_ptr=i32, W_ptr=floats, part_ptr=f32, N="i32", F="i32", K="i32", D="i32")
    yield _spec("_sparse_dot_fwd_kernel", dtype, aligned, cfg, LOADS, types=dot, constexprs=shape, registers=128)
    total = dict(part_ptr=f32, out_ptr=f32, slices="i32", size="i32")
    yield _spec("_sum_slices_kernel", dtype, aligned, cfg, types=total, constexprs={"BLOCK": 1024},
                options=cfg.options() | {"num_warps": 4})  # fmt: skip


def _outer(dtype: str, aligned: bool) -> Iterator[Spec]:
    floats, f32, i32, i64 = f"*{dtype}", "*fp32", "*i32", "*i64"
    cfg = kernels.launch_config(N, D if aligned else D - 3, 2 if dtype == "bf16" else 4, wide=True)
    block, unroll = {"CHUNK": cfg.chunk, "BLOCK_D": cfg.block_d}, {"UNROLL": cfg.unroll}
    lists = dict(tokens_ptr=i32, values_ptr=floats, offsets_ptr=i64)
    chunks = dict(chunk_feature_ptr=i64, first_chunk_ptr=i64)
    partial, result = dict(part_ptr=f32, part_sums_ptr=f32), dict(rows_ptr=f32, sums_ptr=f32)
    sizes = dict(F="i32", D="i32")
    outer = lists | dict(g_ptr=floats) | result | dict(D="i32")
    yield _spec("_sparse_outer_fwd_kernel", dtype, aligned, cfg, LOADS + 1, types=outer, constexprs=block | unroll)
    split = lists | chunks | dict(g_ptr=floats) | partial | sizes
    # Two more than 64 with Triton 3.6 on sm_90: 28 resident blocks, enough for the few split features.
    yield _spec("_sparse_outer_split_kernel", dtype, aligned, cfg, LOADS + 1, types=split,
                constexprs=block | unroll, registers=72)  # fmt: skip
    merge = dict(offsets_ptr=i64) | chunks | partial | result | sizes
    yield _spec("_sparse_outer_merge_kernel", dtype, aligned, cfg, types=merge, constexprs=block)
