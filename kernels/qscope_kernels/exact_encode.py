"""Certified TopK-SAE encoder on CUDA: float32 scores, exactly ranked, at nearly the price of a bfloat16 product.

    score[n, f] = float32(sum_d float64(x[n, d]) float64(W[f, d]) + b[f])      a fixed order of float64 additions

1. The pass: q = bfloat16(x - mu) times bfloat16(W) on tensor cores, float32 scores in a bounded workspace.
2. Candidates: a bound on the pass's error gives each score an interval; a feature whose upper end does not reach
   the k-th largest lower end of its row cannot be selected. The theorem stands in csrc/cuda/certify_bounds.cuh.
3. The candidates are scored in float64, grouped by feature, and the k best chosen. A row with more candidates than its
   list holds, or with numbers out of range, is scored in full: slower, never wrong, and counted in the certificate.

mu makes the bound small, not the answer right: any mu gives the same bits. Nothing waits for the GPU, no allocation
depends on the data. N tokens, D residual width, F dictionary size.

Traffic beyond the product's, with c candidates per row: 8 N F bytes for the float32 scores (written, read), N c D
elements of x out of L2 and F D weights once per batch (`exact_plan`) for step 3.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_kernels import cuda_library
from qscope_kernels.matmul import fixed_matmul
from qscope_kernels.topk_encode import encode_plan

MAX_K = 256
CAPACITY = 2048  # candidates per row: 8 per thread of certify_rows
GROUP = 64  # features that share a coarse bound
DEFAULT_WORKSPACE_BYTES = 1 << 29
# So few rows are scored in full at once: the pass would read W, or its rounded copy, as often as that does.
DIRECT_ROWS = 2
MODES = {"fp32": 0, "bf16x2": 1, "bf16": 2}
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PAIR_CODE = 3


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """What `prepare_encoder` makes of the weights. Tensors on one device."""

    weights: str
    high: Tensor
    """[F, D] bfloat16: the operand of the pass; W itself where that is bfloat16."""
    master: Tensor
    """[F, D] contiguous: the weights that scores are computed from; `high` itself but for weights="fp32"."""
    low: Tensor | None
    """[F, D] bfloat16, added to `master`; only for weights="bf16x2"."""
    bias: Tensor | None
    """[F] float32."""
    mu: Tensor
    """[D] float32."""
    mean: Tensor
    """[1] float64: |mu|, rounded up."""
    bounds: Tensor
    """[F rounded up to 64, 4] float32: |w|, |w - high|, mu . w + b and a constant for each feature."""
    beta: Tensor
    """[F rounded up to 64] float32: the third column of bounds."""
    groups: Tensor
    """[F / 64 rounded up, 4] float32: the maxima of bounds over 64 features."""


def packed_tensors(prepared: PreparedEncoder, W_enc: Tensor) -> list[Tensor]:
    """What `prepare_encoder` made of W_enc, as tensors that share no memory with it: see `from_packed`."""
    p = prepared
    none = p.high.new_empty((0, p.high.shape[1]))
    high = none if p.high.data_ptr() == W_enc.data_ptr() else p.high
    return [high, none if p.low is None else p.low, p.mean, p.bounds, p.beta, p.groups]


def from_packed(W_enc: Tensor, b_enc: Tensor | None, mu: Tensor, tensors: list[Tensor]) -> PreparedEncoder:
    """The prepared encoder of `packed_tensors`. W_enc: the weights meant, or for "bf16x2" their high part."""
    high, low, mean, bounds, beta, groups = tensors
    high = high if high.numel() else W_enc
    kept = (low, "bf16x2") if low.numel() else (None, "fp32")
    return PreparedEncoder(kept[1], high, W_enc, kept[0], _bias_of(b_enc), mu, mean, bounds, beta, groups)


class ExactPlan(NamedTuple):
    """Candidates of `batch` rows are scored together; the pass runs on tiles of `rows` tokens by `columns` features
    (all of F, rounded up to 4, or a multiple of 64). blocks: thread blocks that score flagged rows."""

    batch: int
    rows: int
    columns: int
    blocks: int = 512


class Certificate(NamedTuple):
    """What is known of each row beyond its result."""

    candidates: Tensor
    """[N] int32: features scored in float64; F for a row that was scored in full."""
    margin: Tensor
    """[N] float32: every feature that was not scored lies at least this far below the k-th score; infinite if all
    were scored, NaN for a row with a NaN."""


def available(x: Tensor) -> bool:
    """Whether the kernels can run where x is: on an NVIDIA GPU, with the CUDA library (it warns if missing)."""
    with torch.cuda.device_of(x):
        return x.is_cuda and cuda_library.load() is not None


@torch.no_grad()
def prepare_encoder(
    W_enc: Tensor, b_enc: Tensor | None, mu: Tensor | None, weights: str = "fp32", *, bound_scale: float = 1.0
) -> PreparedEncoder:
    """Round the weights for the pass and bound what that loses, reading W_enc once.

    Args:
        W_enc: [F, D] float32, bfloat16 or float16. Copied if it is not contiguous.
        b_enc: [F], same dtypes, or None.
        mu: [D] float32, subtracted from x before it is rounded: a mean of typical rows. None is zero.
        weights: which weights are meant, and what is kept, beside 20 bytes per feature.
            "fp32": W_enc as given. Kept: W_enc itself (no copy) and a bfloat16 copy, 2 F D bytes; nothing more if W_enc
            is bfloat16. "bf16x2": high + low, bfloat16 each, 16 bits of a float32 weight; 4 F D bytes, and W_enc is
            not needed any more. "bf16": W_enc rounded to bfloat16; 2 F D bytes. The last two are exact for the weights
            they mean, not for W_enc.
        bound_scale: multiplies the features' bounds; below 1 voids the proof. For tests.

    Raises ValueError on shape, dtype, device or mode, RuntimeError without the CUDA library.
    """
    _check_weights(W_enc, b_enc, mu, weights)
    F, D = W_enc.shape
    W = W_enc.contiguous()
    own = W.dtype == torch.bfloat16
    high = W if own else torch.empty(F, D, dtype=torch.bfloat16, device=W.device)
    low = torch.empty_like(high) if weights == "bf16x2" else None
    bias = _bias_of(b_enc)
    mu = torch.zeros(D, device=W.device) if mu is None else mu.contiguous()
    mean = torch.linalg.vector_norm(mu.double()).mul(1 + 2.0**-40).reshape(1)
    padded = -(-F // GROUP) * GROUP
    bounds = torch.zeros(padded, 4, device=W.device)
    beta = torch.zeros(padded, device=W.device)
    _call(
        "qscope_exact_prepare", W,
        _pointer(W), ctypes.c_int(_DTYPE_CODES[W.dtype]), ctypes.c_int64(F), ctypes.c_int64(D), _pointer(mu),
        _pointer(mean), _pointer(bias), ctypes.c_int(MODES[weights]), ctypes.c_double(bound_scale),
        _pointer(None if own else high), _pointer(low), _pointer(bounds), _pointer(beta),
    )  # fmt: skip
    groups = bounds.view(-1, GROUP, 4).amax(1)
    return PreparedEncoder(weights, high, W if weights == "fp32" else high, low, bias, mu, mean, bounds, beta, groups)


@torch.no_grad()
def typical_mean(x: Tensor) -> Tensor:
    """[D] float32: the mean of at most 4096 rows of x [N, D] that are finite and whose squared norm is at most 16
    times the median; zero if there is none. Attention sinks would pull it away from all other rows."""
    part = x[:4096].detach()
    if part.shape[0] == 0:
        return x.new_zeros(x.shape[1], dtype=torch.float32)
    squares = torch.linalg.vector_norm(part, dim=1, dtype=torch.float32).square().nan_to_num(torch.inf, torch.inf)
    keep = squares.isfinite() & (squares <= 16 * squares.sort().values[(len(part) - 1) // 2])
    total = torch.where(keep[:, None], part, 0).sum(0, dtype=torch.float32)
    return total / keep.sum().clamp(min=1)


def exact_plan(N: int, F: int, k: int, D: int, workspace_bytes: int, itemsize: int = 4) -> ExactPlan:
    """Sizes whose workspace stays within `workspace_bytes`; ValueError if one row does not fit. itemsize: of x."""
    per_row = 12 * CAPACITY + 2 * D + 24  # list, scores and pairs; q; bounds, count, tau, flag
    fixed = 8 * (F + 2) + 64
    if workspace_bytes < fixed + per_row:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is too small for F={F}, D={D}: the candidates of one token need "
            f"{fixed + per_row} bytes. Give more, or None for the default."
        )
    # Step 3 reads a row of x once per candidate: 32 MiB of x stay in the L2 cache of an H100 or A100 80 GB (50 and 40
    # MB). It reads W once per batch: 4096 rows make that a few per cent of what the product takes. A third of the
    # workspace at most: the rest makes tiles wide enough for the product.
    cached = max(512, (1 << 25) // max(1, D * itemsize))
    batch = max(1, min(N, 4096, cached, ((workspace_bytes - fixed) // 3) // per_row))
    padded = -(-F // 4) * 4
    tile = encode_plan(batch, padded, k, D, 4, workspace_bytes - fixed - batch * per_row)
    return ExactPlan(batch, min(tile.rows, batch), tile.columns)


@torch.no_grad()
def exact_encode_fwd(
    x: Tensor,
    prepared: PreparedEncoder,
    k: int,
    *,
    workspace_bytes: int | None = None,
    return_certificate: bool = False,
    plan: ExactPlan | None = None,
    bound_scale: float = 1.0,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Certificate]:
    """relu(topk(score, k)): top_acts [N, k] float32, top_indices [N, k] int32, and a Certificate if asked for.

    Order: value descending, then lowest index; -0 equals +0; a row of scores with NaN gives NaN values and indices
    0..k-1. The bits depend on a row of x, the weights meant and k: not on the batch, mu, the workspace or the device,
    as long as the assumption on tensor cores of csrc/cuda/certify_bounds.cuh holds.

    Args:
        x: [N, D] float32, bfloat16 or float16; rows may be any distance apart (other layouts are copied by batches).
        prepared: of `prepare_encoder`, on the device of x.
        k: 1 <= k <= min(F, 256).
        workspace_bytes: bound on what is allocated beside the results (default 512 MiB).
        plan: sizes to use in place of `exact_plan`'s.
        bound_scale: multiplies the rows' bounds; below 1 voids the proof. For tests.

    Raises ValueError on shape, dtype, device, k or workspace, RuntimeError without the CUDA library.
    """
    F, D = prepared.high.shape
    _check_rows(x, prepared, k)
    N = x.shape[0]
    budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    plan = plan or exact_plan(N, F, k, D, budget, x.element_size())
    values, indices = x.new_empty(N, k, dtype=torch.float32), x.new_empty(N, k, dtype=torch.int32)
    certificate = None
    if return_certificate:
        certificate = Certificate(x.new_empty(N, dtype=torch.int32), x.new_empty(N, dtype=torch.float32))
    if N > 0:
        job = _Job(prepared, k, plan, bound_scale, x)
        for begin in range(0, N, job.batch):
            part = slice(begin, begin + job.batch)
            job.encode_batch(_rows_of(x[part]), _cut((values, indices, certificate), part))
    return (values, indices) if certificate is None else (values, indices, certificate)


def exact_topk_encode_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    workspace_bytes: int | None = None,
    return_certificate: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Certificate]:
    """`exact_encode_fwd` on weights that are prepared for this call, centred on `typical_mean`.

    x [N, D], W_enc [F, D], b_enc [F] or None: float32, bfloat16 or float16. Beside the workspace it holds 20 F bytes
    and, unless W_enc is bfloat16, a bfloat16 copy of it; preparing reads W_enc once. Callers that keep their weights
    prepare them once.
    """
    _check_weights(W_enc, b_enc, None, "fp32")
    fits = x.ndim == 2 and x.shape[1] == W_enc.shape[1] and x.dtype in _DTYPE_CODES and x.device == W_enc.device
    if fits and x.shape[0] > DIRECT_ROWS:
        prepared = prepare_encoder(W_enc, b_enc, typical_mean(x))
    else:  # no pass, hence no bounds; or an error that exact_encode_fwd explains
        W, none = W_enc.contiguous(), W_enc.new_empty(0)
        prepared = PreparedEncoder("fp32", W, W, None, _bias_of(b_enc), none, none, none, none, none)
    return exact_encode_fwd(x, prepared, k, workspace_bytes=workspace_bytes, return_certificate=return_certificate)


_Out = tuple[Tensor, Tensor, Certificate | None]


class _Job:
    """One call: its workspace, and the launches of a batch."""

    def __init__(self, prepared: PreparedEncoder, k: int, plan: ExactPlan, bound_scale: float, x: Tensor) -> None:
        self.prepared, self.k, self.scale, self.blocks = prepared, k, bound_scale, plan.blocks
        self.F, self.D = prepared.high.shape
        self.direct = x.shape[0] <= DIRECT_ROWS
        self.batch = min(plan.batch, x.shape[0])
        self.rows = min(plan.rows, self.batch)
        whole = -(-self.F // 4) * 4
        if plan.columns < whole and plan.columns % GROUP:
            raise ValueError(f"{plan}: columns must be a multiple of {GROUP}, or at least {whole} for F={self.F}.")
        self.columns = min(plan.columns, whole)  # also the distance between rows of scores

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        self.centred = empty(self.batch, self.D, dtype=torch.bfloat16)
        self.row_bounds = empty(self.batch, 2, dtype=torch.float32)
        self.list_column = empty(self.batch, CAPACITY, dtype=torch.int32)
        self.list_score = empty(self.batch, CAPACITY, dtype=torch.float32)  # lows, while a row is not complete
        self.pairs = empty(self.batch, CAPACITY, dtype=torch.int32)  # highs, likewise
        self.counts = empty(self.batch, dtype=torch.int32)
        self.taus = empty(self.batch, dtype=torch.float32)
        self.flagged = empty(self.rows + 1, dtype=torch.int32)
        self.feature_counts = empty(self.F + 1, dtype=torch.int32)
        self.places = empty(self.F + 1, dtype=torch.int32)
        self.scores = empty(self.rows * self.columns, dtype=torch.float32)

    def encode_batch(self, x: Tensor, out: _Out) -> None:
        n, direct = x.shape[0], self.direct
        if direct:
            self.counts.fill_(-1)
        else:
            self.feature_counts.zero_()
            self._centre(x)
        for begin in range(0, n, self.rows):
            tile = slice(begin, min(begin + self.rows, n))
            if direct:
                count = tile.stop - begin
                self.flagged[: count + 1].copy_(torch.arange(-1, count, dtype=torch.int32, device=x.device))
                self.flagged[:1].fill_(count)
            else:
                self._certify(tile)
            self._encode_flagged(x[tile], tile, out)
        if not direct:
            self._rescore(x, out)

    def _blocks_of_columns(self) -> list[tuple[int, int]]:
        """First column and number of columns of each block."""
        return [(first, min(self.columns, self.F - first)) for first in range(0, self.F, self.columns)]

    def _centre(self, x: Tensor) -> None:
        p = self.prepared
        _call(
            "qscope_exact_centre", x,
            _pointer(x), ctypes.c_int(_DTYPE_CODES[x.dtype]), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.stride(0)),
            ctypes.c_int64(self.D), _pointer(p.mu), _pointer(p.mean), ctypes.c_double(accumulation(x.device, self.D)),
            ctypes.c_double(self.scale), _pointer(self.centred), _pointer(self.row_bounds),
        )  # fmt: skip

    def _certify(self, tile: slice) -> None:
        p, n = self.prepared, tile.stop - tile.start
        self.flagged[:1].zero_()
        for first, width in self._blocks_of_columns():
            scores = self.scores[: n * self.columns].view(n, self.columns)
            _product(self.centred[tile], p.high[first : first + width], scores[:, :width])
            _call(
                "qscope_exact_certify", scores,
                _pointer(scores), ctypes.c_int64(n), ctypes.c_int64(self.columns), ctypes.c_int64(width),
                ctypes.c_int64(first), ctypes.c_int(first + width == self.F), ctypes.c_int(self.k),
                _pointer(self.row_bounds[tile]), _pointer(p.bounds), _pointer(p.beta), _pointer(p.groups),
                _pointer(self.list_column[tile]), _pointer(self.list_score[tile]), _pointer(self.pairs[tile]),
                _pointer(self.counts[tile]), _pointer(self.taus[tile]), _pointer(self.feature_counts),
                _pointer(self.flagged), ctypes.c_int(256),
            )  # fmt: skip

    def _encode_flagged(self, x: Tensor, tile: slice, out: _Out) -> None:
        values, indices, certificate = _cut(out, tile)
        for first, width in self._blocks_of_columns():
            _call(
                "qscope_exact_score_flagged", x,
                *self._score_arguments(x), _pointer(self.flagged), ctypes.c_int64(width), ctypes.c_int64(first),
                _pointer(self.scores), ctypes.c_int64(self.columns), ctypes.c_int(self.blocks),
            )  # fmt: skip
            _call(
                "qscope_exact_select_flagged", x,
                _pointer(self.scores), ctypes.c_int64(x.shape[0]), ctypes.c_int64(self.columns), ctypes.c_int64(width),
                ctypes.c_int(self.k), ctypes.c_int(first > 0), ctypes.c_int(first + width == self.F),
                ctypes.c_int64(first), ctypes.c_int64(self.F), _pointer(self.counts[tile]), _pointer(values),
                _pointer(indices), *_certificate_pointers(certificate),
            )  # fmt: skip

    def _rescore(self, x: Tensor, out: _Out) -> None:
        values, indices, certificate = out
        rows, capacity, F = ctypes.c_int64(x.shape[0]), ctypes.c_int(CAPACITY), ctypes.c_int64(self.F)
        lists = _pointer(self.list_column)
        torch.cumsum(self.feature_counts, 0, dtype=torch.int32, out=self.places)
        pairs = _pointer(self.places), _pointer(self.pairs)
        _call("qscope_exact_group", x, lists, _pointer(self.counts), rows, capacity, *pairs)
        _call(
            "qscope_exact_score", x,
            *self._score_arguments(x), rows, F, *pairs, capacity, _pointer(self.list_score),
        )  # fmt: skip
        _call(
            "qscope_exact_choose", x,
            lists, _pointer(self.list_score), _pointer(self.counts), _pointer(self.taus), rows, capacity, F,
            ctypes.c_int(self.k), _pointer(values), _pointer(indices), *_certificate_pointers(certificate),
        )  # fmt: skip

    def _score_arguments(self, x: Tensor) -> tuple[object, ...]:
        p = self.prepared
        W_code = _DTYPE_CODES[p.master.dtype] if p.low is None else _PAIR_CODE
        return (
            _pointer(x), ctypes.c_int(_DTYPE_CODES[x.dtype]), ctypes.c_int64(x.stride(0)), ctypes.c_int64(self.D),
            _pointer(p.master), _pointer(p.low), ctypes.c_int(W_code), _pointer(p.bias),
        )  # fmt: skip


def accumulation(device: torch.device, D: int) -> float:
    """gamma of csrc/cuda/certify_bounds.cuh: by what part of |q| |v| the pass's float32 sum may be wrong."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return (D / 16 + 16) * 2.0 ** (-20 if major == 9 else -19)


def _product(q: Tensor, W: Tensor, out: Tensor) -> None:
    with torch.cuda.device_of(q), fixed_matmul():
        if q.is_cuda:
            torch.mm(q, W.t(), out_dtype=torch.float32, out=out)
        else:  # torch has no such product on a CPU, where only tests come
            torch.mm(q.float(), W.float().t(), out=out)


def _call(function: str, tensor: Tensor, *arguments: object) -> None:
    with torch.cuda.device_of(tensor):
        library = cuda_library.load()
        if library is None:
            raise RuntimeError(f"{function} is a CUDA kernel, and there is no library: {cuda_library.problem()}")
        cuda_library.check(getattr(library, function)(*arguments, cuda_library.stream(tensor)), function)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _certificate_pointers(certificate: Certificate | None) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    if certificate is None:
        return _pointer(None), _pointer(None)
    return _pointer(certificate.candidates), _pointer(certificate.margin)


def _cut(out: _Out, rows: slice) -> _Out:
    values, indices, certificate = out
    part = None if certificate is None else Certificate(certificate.candidates[rows], certificate.margin[rows])
    return values[rows], indices[rows], part


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _bias_of(b_enc: Tensor | None) -> Tensor | None:
    return None if b_enc is None else b_enc.float().contiguous()


def _check_weights(W: Tensor, b: Tensor | None, mu: Tensor | None, weights: str) -> None:
    tensors = {"W_enc": W, "b_enc": b, "mu": mu}
    given = ", ".join(f"{n} {list(t.shape)} {t.dtype} on {t.device}" for n, t in tensors.items() if t is not None)
    if weights not in MODES:
        raise ValueError(f"prepare_encoder: weights={weights!r}; accepted are {', '.join(map(repr, MODES))}.")
    good = W.ndim == 2 and W.dtype in _DTYPE_CODES and W.shape[0] > 0
    good = good and (b is None or (b.shape == W.shape[:1] and b.dtype in _DTYPE_CODES))
    good = good and (mu is None or (mu.shape == W.shape[1:] and mu.dtype == torch.float32))
    if not good or any(t is not None and t.device != W.device for t in (b, mu)):
        raise ValueError(
            f"prepare_encoder takes W_enc [F, D] and b_enc [F] in float32, bfloat16 or float16 and mu [D] float32, on "
            f"one device, F at least 1; got {given}."
        )


def _check_rows(x: Tensor, prepared: PreparedEncoder, k: int) -> None:
    F, D = prepared.high.shape
    if x.ndim != 2 or x.shape[1] != D or x.dtype not in _DTYPE_CODES or x.device != prepared.high.device:
        raise ValueError(
            f"exact_encode_fwd takes x [N, {D}] float32, bfloat16 or float16 on {prepared.high.device}, as it was "
            f"prepared for; got {list(x.shape)} {x.dtype} on {x.device}."
        )
    limit = min(F, MAX_K)
    if not 1 <= k <= limit:
        raise ValueError(f"exact_encode_fwd: k={k}; accepted is 1 <= k <= {limit} for these F={F}.")
