"""What row_adam.py launches, with its own configurations: the Qwen-Scope widths, the widest row, a bias, odd widths."""

from collections.abc import Iterator

from aot import Spec
from qscope_kernels import row_adam as kernels

# D, dtype of the gradient, unit_rows with shadow and scale. 16384 takes the kernel for long rows.
VARIANTS = {
    80: ((4096, "fp32", True), (5120, "bf16", True), (16384, "fp32", True), (1, "fp32", False)),
    89: ((4096, "fp32", True), (16384, "fp32", True)),
    90: (
        (2048, "fp32", True),
        (4096, "fp32", True),
        (4096, "bf16", True),
        (5120, "fp32", True),
        (8192, "bf16", False),
        (16384, "fp32", True),
        (16384, "bf16", False),
        (4093, "fp32", True),
        (1, "fp32", False),
    ),
}
TYPES = (
    dict(W_ptr="*fp32", grad_ptr="*fp32", m_ptr="*fp32", v_ptr="*fp32", last_step_ptr="*i32", touched_ptr="*u8")
    | dict(step_ptr="*i64", lr_ptr="*fp32", scale_ptr="*fp32", shadow_ptr="*bf16")
    | dict.fromkeys(("beta1", "beta2", "rest1", "rest2", "log2_beta1", "log2_beta2", "eps"), "fp32")
    | dict(F="i32", D="i32")
)


def specs(arch: int) -> Iterator[Spec]:
    for D, grad, full in VARIANTS[arch]:
        cfg = kernels.launch_config(D)
        flags = {"HAS_SCALE": full, "HAS_SHADOW": full, "UNIT_ROWS": full, "BLOCK_D": cfg.block_d}
        long_rows = cfg.block_d < D
        kernel = kernels._row_adam_long_kernel if long_rows else kernels._row_adam_kernel
        types = TYPES | {"grad_ptr": f"*{grad}"} | ({} if full else {"shadow_ptr": "*fp32"})
        if D == 1:  # Triton makes a constant of an argument that is 1
            types, flags = {name: kind for name, kind in types.items() if name != "D"}, flags | {"D": 1}
        aligned = D % 16 == 0
        # W, both moments and a float32 gradient: 16 elements per thread of each, four to a load.
        per_array = cfg.block_d // (cfg.num_warps * 32) // 4
        yield Spec(
            f"{kernel.__name__}-{D}-{grad}",
            kernel,
            types=types,
            constexprs=flags | ({} if long_rows else {"ROWS": cfg.rows}),
            options=cfg.options(),
            divisible=("F", "D") if aligned else ("F",),
            registers=128 if aligned else 255,  # 512 threads per SM, whose loads under way cover the memory's latency
            wide_loads=per_array * 3 if aligned else 0,
            in_flight=6 if aligned else 0,
        )
