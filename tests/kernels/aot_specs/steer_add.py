"""What steer_add.py launches at Qwen-Scope's 8B width, with its own configurations."""

from collections.abc import Iterator

import triton
from aot import Spec
from qscope_kernels import steer_add as kernels

D = 4096
# Per architecture: tokens, directions, dtype of h, dtype of the readers, gates and directions, D is a multiple of 16.
VARIANTS = {
    80: ((8192, 8, "bf16", "bf16", True), (1, 1, "bf16", "bf16", True), (8192, 8, "fp32", "fp32", True)),
    89: ((8192, 8, "bf16", "bf16", True), (1, 1, "bf16", "bf16", True)),
    90: (
        (8192, 1, "bf16", "bf16", True),
        (8192, 8, "bf16", "bf16", True),
        (8192, 32, "bf16", "bf16", True),
        (1, 1, "bf16", "bf16", True),
        (1, 32, "bf16", "bf16", True),
        (8192, 8, "fp32", "fp32", True),
        (8192, 8, "bf16", "fp32", True),
        (8192, 8, "bf16", "bf16", False),
    ),
}
ITEMSIZE = {"bf16": 2, "fp32": 4}


def specs(arch: int) -> Iterator[Spec]:
    for N, S, h, rows, aligned in VARIANTS[arch]:
        name = f"-{N}x{S}-{h}-{rows}{'' if aligned else '-oddD'}"
        width = D if aligned else D - 3
        ones = {size: 1 for size, value in (("N", N), ("S", S)) if value == 1}  # Triton makes a constant of a 1
        yield _shared(name, N, S, h, rows, width, ones, aligned)
        yield _rows(name, N, S, h, rows, width, ones, aligned)


def _types(h: str, rows: str, readers: bool, ones: dict[str, int]) -> dict[str, str]:
    types = {"h_ptr": f"*{h}", "h_stride": "i32", "directions_ptr": f"*{rows}", "settings_ptr": "*fp32"}
    types |= {"readers_ptr": f"*{rows}", "gates_ptr": f"*{rows}"} if readers else {}
    types |= {"mask_ptr": "*u8"} | ({"mask_stride": "i32", "mask_stride_s": "i32"} if readers else {})
    types |= {"fired_ptr": "*u8"} | ({"c_ptr": "*fp32"} if readers else {})
    return types | {size: "i32" for size in ("N", "S", "D") if size not in ones}


def _divisible(N: int, S: int, aligned: bool) -> tuple[str, ...]:
    sizes = {"N": N, "S": S} | ({"D": D, "h_stride": D} if aligned else {})
    return tuple(name for name, value in sizes.items() if value % 16 == 0)


def _shared(name: str, N: int, S: int, h: str, rows: str, width: int, ones: dict[str, int], aligned: bool) -> Spec:
    cfg = kernels.shared_config(N, S, width, ITEMSIZE[h], aligned)
    # A mask [N] has stride 1, and one token per program is 1 too: constants.
    constants = ones | {"mask_stride": 1} | ({"tokens": 1} if cfg.tokens == 1 else {})
    types = _types(h, rows, readers=False, ones=ones) | ({} if cfg.tokens == 1 else {"tokens": "i32"})
    return Spec(
        f"_steer_shared_kernel{name}",
        kernels._steer_shared_kernel,
        types=types,
        constexprs=constants
        | {"SP": triton.next_power_of_2(S), "UNROLL": cfg.directions, "BT": cfg.rows, "BD": cfg.block_d},
        options=cfg.options(),
        divisible=_divisible(N, S, aligned),
        # 4 programs of 128 threads per SM, as the configuration assumes.
        registers=128,
        # One load per direction and one per token; the tokens of a tile are requested together.
        wide_loads=cfg.directions + cfg.rows if aligned else 0,
        in_flight=cfg.rows // 2 if aligned else 0,
    )


def _rows(name: str, N: int, S: int, h: str, rows: str, width: int, ones: dict[str, int], aligned: bool) -> Spec:
    cfg = kernels.rows_config(N, S, width, max(ITEMSIZE[h], ITEMSIZE[rows]), aligned)
    constants = ones | ({"mask_stride": 1, "mask_stride_s": 1} if S == 1 else {"mask_stride_s": 1})
    types = {n: t for n, t in _types(h, rows, readers=True, ones=ones).items() if n not in constants}
    shape = {"BT": cfg.rows, "SB": cfg.directions, "BD": cfg.block_d, "VEC": cfg.vec}
    return Spec(
        f"_steer_rows_kernel{name}",
        kernels._steer_rows_kernel,
        types=types,
        constexprs=constants | shape,
        options=cfg.options(),
        divisible=_divisible(N, S, aligned),
        # Two programs of 256 threads per SM where there is one direction, the usual case.
        registers=128 if S == 1 else 255,
        # Readers and gates: a tile of tokens and of rows each; the update: tokens and one row per direction.
        wide_loads=2 * (cfg.rows + cfg.directions) + 1 + cfg.directions if aligned and h == rows else 0,
        in_flight=(cfg.rows + cfg.directions) // 2 if aligned and h == rows else 0,
    )
