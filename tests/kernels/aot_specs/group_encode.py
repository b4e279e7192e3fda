"""What group_encode.py launches, on Hopper: `group_problem` keeps it from other GPUs."""

from collections.abc import Iterator

from aot import Spec
from qscope_kernels import group_encode as kernels

F = 65536
H200_MULTIPROCESSORS = 132


def specs(arch: int) -> Iterator[Spec]:
    if arch != 90:
        return
    for N, bias in ((8192, True), (8192, False), (100, True)):
        cfg = kernels.group_config(N, H200_MULTIPROCESSORS)
        half = cfg.block_f // 2
        descriptors = {
            "x_desc": f"tensordesc<bf16[{cfg.block_n}, {cfg.block_d}]>",
            "W_desc": f"tensordesc<bf16[{cfg.block_f}, {cfg.block_d}]>",
            "scores_desc": f"tensordesc<bf16[{cfg.block_n}, {half}]>",
        }
        constexprs = dict(HAS_BIAS=bias, GROUP=cfg.group, BLOCK_N=cfg.block_n, BLOCK_F=cfg.block_f)
        constexprs |= dict(BLOCK_D=cfg.block_d, ROW_TILES=cfg.row_tiles, PROGRAMS=cfg.programs, UPCAST=False)
        yield Spec(
            f"_group_encode_kernel-{cfg.block_n}x{cfg.block_f}{'' if bias else '-nobias'}",
            kernels._group_encode_kernel,
            types=descriptors | dict(b_ptr="*bf16", maxima_ptr="*bf16", N="i32", F="i32", D="i32"),
            constexprs=constexprs,
            options=cfg.options(),
            divisible=("F",),
            # One program of 8 warps fills an SM; its accumulator alone is block_f / 2 registers per thread.
            registers=block_registers(cfg),
            instructions=("HGMMA", "UTMALDG", "UTMASTG"),
        )


def block_registers(cfg: kernels.GroupConfig) -> int:
    accumulator = cfg.block_n * cfg.block_f // (cfg.num_warps * 32)
    return accumulator + 88
