"""TopK-SAE encoder on CUDA: matrix product into a bounded workspace, then one read of the scores per row.

    top_acts[n], top_indices[n] = relu(topk(x[n] W_enc^T + b_enc, k))

Scores are made a tile at a time, `plan.columns` features of `plan.rows` tokens, so that memory does not grow with N
or F; the tiles of a row are merged by `topk_select_fwd`, which makes the answer that of the whole row. There are two
ways to make and read a tile: "cublas" (design E1: torch's matrix product, then `topk_select_fwd`) and "group"
(design E2: `group_encode.py`). N tokens, D residual width, F dictionary size.

Memory traffic beyond the operands, with scores of s bytes: "cublas" writes and reads N F s bytes; "group" writes
N F (1 + 1 / 64) s and reads N F s / 64 + 64 N k s.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_kernels._arguments import FLOATS, check, describe
from qscope_kernels.group_encode import GROUP, group_encode_fwd, group_problem
from qscope_kernels.matmul import fixed_matmul
from qscope_kernels.topk_select import topk_select_fwd

MAX_K = 256
# 2048 tokens of a 64K dictionary in bfloat16: 16 x 256 tiles of 128 x 256, 31 waves on 132 SMs. The last, partly
# filled wave costs at most 1 in 32.
DEFAULT_WORKSPACE_BYTES = 1 << 28
DTYPES = {"bf16": torch.bfloat16, "exact": torch.float32}
METHODS = ("cublas", "group")


@dataclass(frozen=True)
class EncodePlan:
    """Tiles of the score matrix: `rows` tokens by `columns` features, both at least 1. Columns below F are a
    multiple of 64 and at least k; the last tile of each direction may be smaller."""

    rows: int
    columns: int


@dataclass(frozen=True)
class GroupWin:
    """A region of shapes where "group" was measured to be faster than "cublas", on devices of `capability`; both ends
    of each range belong to it."""

    capability: tuple[int, int]
    N: tuple[int, int]
    D: tuple[int, int]
    F: tuple[int, int]
    k: tuple[int, int]


# Empty because neither design has been timed on a GPU yet: a region is entered with the run that measured it.
ENCODE_TABLE: tuple[GroupWin, ...] = ()


def choose_method(capability: tuple[int, int], N: int, F: int, D: int, k: int) -> str:
    """The method for a shape: "group" inside a region of ENCODE_TABLE, "cublas" elsewhere."""
    for win in ENCODE_TABLE:
        ranges = ((N, win.N), (F, win.F), (D, win.D), (k, win.k))
        if capability == win.capability and all(low <= size <= high for size, (low, high) in ranges):
            return "group"
    return "cublas"


def encode_plan(
    N: int,
    F: int,
    k: int,
    D: int,
    itemsize: int,
    workspace_bytes: int,
    *,
    copies_x: bool = False,
    copies_W: bool = False,
) -> EncodePlan:
    """Cut the [N, F] scores of `itemsize` bytes into tiles whose workspace stays within `workspace_bytes`.

    The workspace is a tile of scores and, where copies_x or copies_W says so, the operands of that tile in the
    dtype of the product ([rows, D], [columns, D]). Raises ValueError if not even one row of the narrowest
    columns fits.
    """
    budget = workspace_bytes // itemsize
    x_width, W_width = D * copies_x, D * copies_W
    narrowest = min(F, _round_up(k, 64))
    least = (narrowest + x_width + W_width * narrowest) * itemsize
    if least > workspace_bytes:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is too small for k={k}, F={F}, D={D}: one token needs {least} bytes. "
            "Give at least that, or None for the default."
        )
    N = max(N, 1)
    # Whole rows, as long as 256 of them fit: each tile of the dictionary is then used by two tiles of tokens.
    rows = (budget - W_width * F) // (F + x_width)
    if rows >= min(N, 256):
        return EncodePlan(N if rows >= N else rows // 256 * 256, F)
    # Blocks of columns: as wide as 2048 rows allow, because each block costs a row one call of the select (its k best
    # so far, in and out) and a copy of x where that is cast. More rows would not make the product more efficient.
    sizes = [min(N, 2048)] + [1 << i for i in range(10, -1, -1) if 1 << i < N]
    wide = max(narrowest, min(F, 2048))
    fits = [(rows, (budget - x_width * rows) // (rows + W_width)) for rows in sizes]
    rows, columns = next(
        (fit for fit in fits if fit[1] >= wide and fit[0] >= min(N, 256)),
        next(fit for fit in fits if fit[1] >= narrowest),
    )
    if columns >= F:
        return EncodePlan(rows, F)
    blocks = -(-F // (columns // 64 * 64))
    return EncodePlan(rows, max(narrowest, _round_up(-(-F // blocks), 64)))


def topk_encode_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    precision: str = "bf16",
    workspace_bytes: int | None = None,
    method: str | None = None,
    config: EncodePlan | None = None,
) -> tuple[Tensor, Tensor]:
    """relu(topk(x W_enc^T + b_enc)): top_acts [N, k] and top_indices [N, k] int32.

    Order: value descending, then lowest index; -0 equals +0; a row of scores with NaN gives NaN values and
    indices 0..k-1. ReLU comes after the selection.

    Args:
        x: [N, D] float32, bfloat16 or float16, any strides.
        W_enc: [F, D], same dtypes. b_enc: [F] or None.
        k: 1 <= k <= min(F, 256).
        precision: "bf16" casts the inputs to bfloat16 and ranks the bfloat16 scores that F.linear gives for a tile
            of them; values are bfloat16. "exact" upcasts the inputs and ranks float32 scores of an IEEE product
            (no TF32); values are float32.
        workspace_bytes: bound on what is allocated beside the two results and a bias that must be cast (default
            256 MiB). Operands of another dtype or layout are copied into it tile by tile. Without the CUDA library,
            the Triton fallback of `topk_select_fwd` takes up to 32 MiB beside it.
        method: "cublas", "group", or None to choose by `choose_method`.
        config: tiles to use in place of `encode_plan`'s.

    The same inputs give the same bits from run to run. cuBLAS may use another algorithm for another tile shape, so
    the last bit of a score can depend on how many rows are encoded together, on the workspace and on the device, and
    it can differ between the two methods.
    Nothing waits for the GPU. Raises ValueError on shape, dtype, device, k, or an option that does not fit.
    """
    _check_inputs(x, W_enc, b_enc, k, precision)
    dtype = DTYPES[precision]
    (N, D), F = x.shape, W_enc.shape[0]
    copies_x, copies_W = (t.dtype != dtype or not t.is_contiguous() for t in (x, W_enc))
    budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    method = _checked_method(method, x, W_enc, b_enc, k, precision)
    if method == "group":  # the group maxima, bfloat16 like the scores, belong to the workspace as well
        budget = budget * GROUP // (GROUP + 1)
    plan = config or encode_plan(N, F, k, D, dtype.itemsize, budget, copies_x=copies_x, copies_W=copies_W)
    values, indices = x.new_empty(N, k, dtype=dtype), x.new_empty(N, k, dtype=torch.int32)
    if N == 0:
        return values, indices
    rows, columns = min(plan.rows, N), min(plan.columns, F)
    if method == "group" and columns < F:
        raise ValueError(
            f"method='group' needs whole rows of F={F} scores in the workspace, and the plan is {plan}. "
            "Give a larger workspace_bytes or method='cublas'."
        )
    scores = x.new_empty(rows * columns, dtype=dtype)
    x_copy = x.new_empty(rows if copies_x else 0, D, dtype=dtype)
    W_copy = x.new_empty(columns if copies_W else 0, D, dtype=dtype)
    b = None if b_enc is None else b_enc.to(dtype).contiguous()
    with torch.no_grad(), torch.cuda.device_of(x), fixed_matmul():
        for first in range(0, F, columns):
            W = _operand(W_enc[first : first + columns], W_copy)
            bias = None if b is None else b[first : first + columns]
            for begin in range(0, N, rows):
                tile = _operand(x[begin : begin + rows], x_copy)
                out = values[begin : begin + rows], indices[begin : begin + rows]
                if method == "group":
                    group_encode_fwd(tile, W, bias, k, scores=scores, out=out)
                else:
                    _encode_tile(tile, W, bias, k, scores, out, first, last=first + columns >= F)
    return values, indices


def _encode_tile(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    k: int,
    workspace: Tensor,
    out: tuple[Tensor, Tensor],
    first_column: int,
    last: bool,
) -> None:
    scores = workspace[: x.shape[0] * W.shape[0]].view(x.shape[0], W.shape[0])
    # Contiguous, with a bias of one dimension: the conditions under which torch lets cuBLASLt add the bias itself.
    if bias is None:
        torch.mm(x, W.t(), out=scores)
    else:
        torch.addmm(bias, x, W.t(), out=scores)
    topk_select_fwd(scores, k, relu=last, out=out, first_column=first_column, merge=first_column > 0)


def _operand(part: Tensor, copy: Tensor) -> Tensor:
    """`part` itself, or its cast and contiguous copy in the workspace where there is one."""
    return copy[: part.shape[0]].copy_(part) if copy.shape[0] else part


def _checked_method(method: str | None, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, precision: str) -> str:
    if method not in (None, *METHODS):
        raise ValueError(f"topk_encode_fwd: method={method!r}; accepted are None, 'cublas' and 'group'.")
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    chosen = method or choose_method(capability, x.shape[0], W_enc.shape[0], x.shape[1], k)
    if chosen != "group":
        return chosen
    problem = f"precision={precision!r} is not 'bf16'" if precision != "bf16" else group_problem(x, W_enc, k)
    if problem is None:
        return chosen
    if method is None:  # the table speaks of shapes only
        return "cublas"
    raise ValueError(f"topk_encode_fwd: method='group' cannot take these inputs: {problem}. Use method='cublas'.")


def _check_inputs(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, precision: str) -> None:
    tensors = {"x": x, "W_enc": W_enc} | ({} if b_enc is None else {"b_enc": b_enc})
    given = describe(**tensors)
    check(
        x.ndim == 2 and W_enc.ndim == 2 and x.shape[1] == W_enc.shape[1],
        f"topk_encode_fwd takes x [N, D] and W_enc [F, D]; got {given}.",
    )
    check(
        b_enc is None or b_enc.shape == W_enc.shape[:1],
        f"topk_encode_fwd takes b_enc [F] with W_enc [F, D]; got {given}.",
    )
    check(
        all(t.dtype in FLOATS for t in tensors.values()),
        f"topk_encode_fwd takes float32, bfloat16 or float16; got {given}. Cast the other tensors.",
    )
    check(
        all(t.device == x.device for t in tensors.values()),
        f"topk_encode_fwd takes tensors on one device; got {given}. Move them together.",
    )
    limit = min(W_enc.shape[0], MAX_K)
    check(1 <= k <= limit, f"topk_encode_fwd: k={k}; accepted is 1 <= k <= {limit} for these F={W_enc.shape[0]}.")
    check(precision in DTYPES, f"topk_encode_fwd: precision={precision!r}; accepted are 'bf16' and 'exact'.")


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
