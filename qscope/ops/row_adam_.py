"""Adam on the rows that a batch touched, in place: projection, moments, update, renormalisation, bf16 copy."""

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import INTS, call, check_devices, check_float, check_sizes, operator, shape_of


def row_adam_(
    W: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    touched: Tensor,
    step: Tensor | int,
    lr: Tensor | float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    grad_scale: Tensor | float | None = None,
    unit_rows: bool = False,
    shadow: Tensor | None = None,
) -> None:
    """One Adam step on the rows f of W with touched[f], in place and, on a GPU, in one launch. No other row is read.

    For each such row w, in this order, in float32:

        g = grad[f] * grad_scale;   if unit_rows: g -= <g, w> / <w, w> * w    (the part parallel to the row)
        dt = step - last_step[f]
        exp_avg    = beta1^dt * exp_avg    + (1 - beta1) * g
        exp_avg_sq = beta2^dt * exp_avg_sq + (1 - beta2) * g^2
        w -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
        if unit_rows: w /= ||w||;   shadow[f] = w rounded to nearest even;   last_step[f] = step

    Source: Adam, Kingma and Ba 2015, algorithm 1; the powers of dt catch up with the steps in which the row was not
    touched. Moments are those of dense Adam that saw zero gradients there. What differs from dense Adam: it also
    moves the row in those steps, by what is left of its momentum. What differs from torch.optim.SparseAdam: there the
    moments of a row stand still while it is not touched. With every row touched at every step this is
    torch.optim.Adam.

    A touched row whose scaled gradient is not finite, or has a squared norm that overflows float32, would be lost for
    ever: it is left as it is, last_step[f] included, so that `touched & (last_step != step)` finds it. A row of zeros
    has no direction: nothing is removed from its gradient, and a result of zeros is not divided. A last_step after
    step counts as dt = 0. While a step tensor holds less than 1, nothing is changed.

    step, lr and grad_scale are read on the device: a CUDA graph replays with what the tensors hold then (numbers are
    frozen into it). Nothing waits for the GPU. The same inputs give the same bits, for any number of CPU threads.

    Args:
        W: master weights, [F, D] float32, contiguous; a bias is passed as b.view(F, 1).
        grad: [F, D], float32, bfloat16 or float16, contiguous; rows that are not touched may hold anything.
        exp_avg, exp_avg_sq: first and second moment, [F, D] float32, contiguous; zeros at the start.
        last_step: step of each row's last update, [F] int32; zeros at the start.
        touched: [F] bool.
        step: number of this step, from 1; [] int32 or int64 tensor, or a number.
        lr: learning rate; [] float32 tensor, or a number.
        beta1, beta2: in [0, 1).
        eps: above 0.
        grad_scale: factor on grad (clipping, loss scaling); [] float32 tensor, a number, or None for 1.
        unit_rows: keep rows at norm 1.
        shadow: [F, D] bfloat16, contiguous, receives the updated rows; or None.

    Raises:
        ValueError: shapes, dtypes, strides, devices or numbers that do not fit.
    """
    op = "row_adam_"
    _check_matrices(op, W, grad, exp_avg, exp_avg_sq, shadow)
    for name, rows, dtype in (("last_step", last_step, torch.int32), ("touched", touched, torch.bool)):
        if rows.shape != W.shape[:1] or rows.dtype != dtype:
            given = f"{shape_of(rows)} {rows.dtype}"
            raise ValueError(f"{op}: {name} is {given}; it must be [{W.shape[0]}] {dtype}, one entry per row of W.")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{op}: {name}={beta}; accepted is 0 <= {name} < 1.")
    if not eps > 0:
        raise ValueError(f"{op}: eps={eps}; it must be above 0, else an entry without a gradient becomes NaN.")
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"{op}: step={step}; steps count from 1.")
    step = _scalar(op, "step", step, INTS, W)
    lr = _scalar(op, "lr", lr, (torch.float32,), W)
    grad_scale = None if grad_scale is None else _scalar(op, "grad_scale", grad_scale, (torch.float32,), W)
    check_devices(op, W, grad, exp_avg, exp_avg_sq, last_step, touched, step, lr, grad_scale, shadow)
    in_place = {"W": W, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "last_step": last_step}
    for name, t in (in_place | {"touched": touched} | ({} if shadow is None else {"shadow": shadow})).items():
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {t.stride()}; it must be contiguous, no copy is made here.")
    with torch.no_grad():  # W may be a parameter
        call(_op, W, grad, exp_avg, exp_avg_sq, last_step, touched, step, lr, beta1, beta2, eps, grad_scale,
             unit_rows, shadow)  # fmt: skip


def _check_matrices(
    op: str, W: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, shadow: Tensor | None
) -> None:
    matrices = {"W": W, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    dtypes = dict.fromkeys(("W", "exp_avg", "exp_avg_sq"), torch.float32)
    if shadow is not None:
        matrices["shadow"], dtypes["shadow"] = shadow, torch.bfloat16
    for name, t in matrices.items():
        check_float(op, name, t, "[F, D]")
        if t.dtype != dtypes.get(name, t.dtype):
            raise ValueError(f"{op}: {name} is {t.dtype}; it must be {dtypes[name]}.")
    sizes = ", ".join(f"{name} is {shape_of(t)}" for name, t in matrices.items())
    check_sizes(
        op, f"{sizes}, all [F, D]", *((s, w) for t in matrices.values() for s, w in zip(t.shape, W.shape, strict=True))
    )


def _scalar(op: str, name: str, value: Tensor | float, dtypes: tuple[torch.dtype, ...], like: Tensor) -> Tensor:
    """The number as a tensor on the device; a fill, not a copy from the host, which would wait."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtypes[-1], device=like.device)
    if value.dim() or value.dtype not in dtypes:
        accepted = " or ".join(map(str, dtypes))
        raise ValueError(f"{op}: {name} is {shape_of(value)} {value.dtype}; accepted is a number or a [] {accepted}.")
    return value


_op = operator(
    reference.row_adam_,
    schema=(
        "(Tensor(a!) W, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) last_step, Tensor touched, "
        "Tensor step, Tensor lr, float beta1, float beta2, float eps, Tensor? grad_scale, bool unit_rows, "
        "Tensor(e!)? shadow) -> ()"
    ),
)


@_op.register_fake
def _(
    W: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    touched: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None,
    unit_rows: bool,
    shadow: Tensor | None,
) -> None:
    torch._check(W.shape == grad.shape, lambda: "W and grad must both be [F, D]")
    torch._check(W.shape == exp_avg.shape == exp_avg_sq.shape, lambda: "the moments must be [F, D] like W")


@_op.register_kernel("cuda")
def _(
    W: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    touched: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None,
    unit_rows: bool,
    shadow: Tensor | None,
) -> None:
    from qscope_kernels.row_adam import row_adam_ as launch  # triton is imported only when a GPU is used

    launch(W, grad, exp_avg, exp_avg_sq, last_step, touched, step, lr, beta1, beta2, eps, grad_scale, unit_rows, shadow)
