"""What decode_loss.py launches for a [N, K] batch, with the launcher's own configurations."""

from collections.abc import Iterator

from aot import Spec
from qscope_kernels import decode_loss as kernels

D = 4096
# Per architecture: dtype of the matrices, K, and whether D divides by 16.
VARIANTS = {
    80: (("bf16", 100, True), ("fp32", 100, True)),
    89: (("bf16", 100, True),),
    90: (("bf16", 50, True), ("bf16", 100, True), ("bf16", 256, True), ("fp32", 100, True), ("bf16", 100, False)),
}


def specs(arch: int) -> Iterator[Spec]:
    for dtype, K, aligned in VARIANTS[arch]:
        yield _main(dtype, K, aligned)
    for dtype in ("bf16", "fp32"):
        yield from _variance(dtype)


def _main(dtype: str, K: int, aligned: bool) -> Spec:
    floats, f32, i32 = f"*{dtype}", "*fp32", "*i32"
    itemsize = 2 if dtype == "bf16" else 4
    cfg = kernels.loss_config(K, D if aligned else D - 3, itemsize)
    tiles = cfg.tiles(K)
    types = dict(acts_ptr=f32, indices_ptr=i32, W_ptr=floats, b_ptr=floats, x_ptr=floats, y_ptr=floats)
    types |= dict(error_ptr=f32, sq_ptr=f32, dot_ptr=f32, N="i32", F="i32", K="i32", D="i32")
    # Every tile is one 128-bit load per thread, and no row is read twice.
    loads = tiles["TILES"] if aligned else 0
    return Spec(
        f"_decode_loss_kernel-{dtype}-K{K}{'' if aligned else '-oddD'}",
        kernels._decode_loss_kernel,
        types=types,
        constexprs={"HAS_BIAS": True} | tiles,
        options=cfg.options(),
        divisible=("N", "F", "D") if aligned else (),
        # 128 leave 16 warps on an SM; lists that fill all 128 elements a thread may hold take the next step, 12.
        registers=(128 if K <= 100 else 168) if aligned else 255,
        wide_loads=loads,
        # ptxas may start the sums before the last few.
        in_flight=loads // 2,
    )


def _variance(dtype: str) -> Iterator[Spec]:
    floats, f32 = f"*{dtype}", "*fp32"
    block = {"BLOCK_D": 128 if dtype == "bf16" else 64}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    loads = 4  # a tile of 32 rows x 256 bytes over 128 threads
    yield Spec(
        f"_variance_chunks_kernel-{dtype}",
        kernels._variance_chunks_kernel,
        types=dict(x_ptr=floats, mean_ptr=f32, m2_ptr=f32, N="i32", D="i32", rows="i32"),
        constexprs={"ROWS": 32} | block,
        options=options,
        divisible=("N", "D", "rows"),
        registers=128,
        wide_loads=loads,
    )
    if dtype == "bf16":
        yield Spec(
            "_variance_merge_kernel",
            kernels._variance_merge_kernel,
            types=dict(mean_ptr=f32, m2_ptr=f32, part_ptr=f32, N="i32", D="i32", rows="i32", chunks="i32"),
            constexprs=block,
            options=options,
            divisible=("N", "D", "rows"),
            registers=64,
        )
