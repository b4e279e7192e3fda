"""What the Triton fallback of topk_select.py launches."""

from collections.abc import Iterator

from aot import Spec
from qscope_kernels import topk_select as kernels

CFG = kernels.LaunchConfig()
# Per architecture: dtype, k (which chooses the list's capacity), whether an earlier result is merged.
VARIANTS = {
    80: (("bf16", 100, True),),
    89: (("fp16", 256, False),),
    90: (("bf16", 256, True), ("fp32", 50, False)),
}


def specs(arch: int) -> Iterator[Spec]:
    options = {"num_warps": CFG.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    for dtype, k, merge in VARIANTS[arch]:
        constants = kernels.fallback_constants(k, CFG.block)
        itemsize = 4 if dtype == "fp32" else 2
        capacity = constants["CAPACITY"]
        result = dict(values_ptr=f"*{dtype}", indices_ptr="*i32")
        collect = dict(scores_ptr=f"*{dtype}") | result | dict(list_ptr="*i64", row_stride="i32", F="i32", k="i32")
        yield Spec(
            f"collect-{dtype}-k{k}", kernels._topk_select_collect_kernel, collect | dict(first_column="i32"),
            {"MERGE": merge} | constants, options, divisible=("row_stride", "F"), registers=128,
            wide_loads=3 * CFG.block * itemsize // (CFG.num_warps * 32 * 16),  # three loops read the row
        )  # fmt: skip
        order = kernels.order_options(capacity)
        yield Spec(
            f"order-{dtype}-k{k}", kernels._topk_select_order_kernel, dict(list_ptr="*i64") | result | dict(k="i32"),
            {"RELU": True, "CAPACITY": capacity, "STEP": order.pop("STEP")}, order, registers=128,
        )  # fmt: skip
