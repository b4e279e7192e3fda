"""What feature_penalty.py launches at the Qwen-Scope 1.7B and 8B widths, with its own configurations."""

from collections.abc import Iterator

from aot import Spec
from qscope_kernels import feature_penalty as kernels

# Per architecture: D, features, dtype of x (the rows are float32).
VARIANTS = {
    80: ((4096, 8, "bf16"), (2048, 2, "fp32")),
    89: ((4096, 8, "bf16"),),
    90: ((2048, 2, "bf16"), (4096, 8, "bf16"), (4096, 32, "fp32"), (4096, 8, "fp16"), (4093, 8, "bf16")),
}


def specs(arch: int) -> Iterator[Spec]:
    for D, S, x in VARIANTS[arch]:
        cfg = kernels.penalty_config(S, D, 4, D % 16 == 0)
        name, widths = f"-{D}x{S}-{x}", (("D", "x_stride") if D % 16 == 0 else ()) + (("S",) if S % 16 == 0 else ())
        sizes = dict(N="i32", S="i32", D="i32")
        yield Spec(
            f"_feature_penalty_kernel{name}",
            kernels._feature_penalty_kernel,
            types=dict(x_ptr=f"*{x}", x_stride="i32", W_ptr="*fp32", b_ptr="*fp32", alpha_ptr="*fp32", group_ptr="*i64")
            | dict(part_ptr="*fp32", active_ptr="*u8")
            | sizes
            | dict(G="i32"),
            constexprs=dict(BT=cfg.rows, SB=cfg.features, BD=cfg.block_d, VEC=cfg.vec),
            options=cfg.options(),
            divisible=("N", *widths),
            registers=128 if D % 16 == 0 else 168,  # 512 threads per SM, 384 without wide loads
            # Every lane loads 128 bits of each row, and of each token where x is as wide.
            wide_loads=cfg.features + (cfg.rows if x == "fp32" else 0) if D % 16 == 0 else 0,
        )
        yield Spec(
            f"_feature_penalty_grad_kernel{name}",
            kernels._feature_penalty_grad_kernel,
            types=dict(active_ptr="*u8", grad_ptr="*fp32", W_ptr="*fp32", out_ptr=f"*{x}") | sizes,
            constexprs=dict(BT=cfg.rows, BD=cfg.block_d),
            options=cfg.options(),
            divisible=("N", *(w for w in widths if w != "x_stride")),
            registers=64,
            wide_loads=1 if D % 16 == 0 else 0,
        )
    yield Spec(
        "_sum_programs_kernel",
        kernels._sum_programs_kernel,
        types=dict(part_ptr="*fp32", sums_ptr="*fp32", programs="i32", S="i32"),
        constexprs=dict(BLOCK=1024),
        options=kernels._SUM_OPTIONS,
        divisible=("programs",),
        registers=64,
    )
