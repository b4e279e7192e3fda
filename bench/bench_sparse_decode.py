"""python bench/bench_sparse_decode.py: our decoder and its backward pass against F.embedding_bag."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "kernels"),
]

from _harness import Report, arguments, measure  # noqa: E402  (the path set above spares an install)

from qscope import reference  # noqa: E402
from qscope.ops import sparse_decode  # noqa: E402

D, D_SAE, K = 2048, 32768, 50
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]


def embedding_bag(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return F.embedding_bag(indices, W, mode="sum", per_sample_weights=values)


def forward_backward(decode: Decoder, values: Tensor, indices: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    values, W = values.detach().requires_grad_(), W.detach().requires_grad_()
    y = decode(values, indices, W)
    return torch.autograd.grad(y, (values, W), torch.ones_like(y))


def check(result: Tensor, want: Tensor) -> None:
    """Within one rounding to the result's dtype of the reference's float32 sums."""
    rounding = 1e-5 if result.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.float(), want, rtol=rounding, atol=1e-4)


def check_gradients(result: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Sums of D products and of a feature's entries, both in float32 but in another order."""
    torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-3)


def main() -> None:
    options = arguments(__doc__, rounds=41)
    report = Report("sparse_decode", options.device)
    torch.manual_seed(0)
    W = torch.randn(D_SAE, D, device=options.device)
    for dtype in (torch.float32, torch.bfloat16):
        weight = W.to(dtype)
        for N in (1, 256, 512):
            values = torch.rand(N, K, device=options.device).to(dtype)
            indices = torch.randint(0, D_SAE, (N, K), device=options.device)
            want = reference.sparse_decode(values.float(), indices, weight.float())
            shape = dict(N=N, K=K, D=D, F=D_SAE)
            times = measure(
                {
                    "qscope": lambda v=values, i=indices, w=weight: sparse_decode(v, i, w),
                    "embedding_bag": lambda v=values, i=indices, w=weight: embedding_bag(v, i, w),
                },
                options.device,
                options.rounds,
                lambda result, w=want: check(result, w),
            )
            report.add("sparse_decode", "fwd", shape, str(dtype)[6:], times)
        if dtype == torch.float32:  # embedding_bag has no bfloat16 gradient of its weights on a CPU
            ones = torch.ones_like(want)
            grad_values = reference.sparse_dot(ones, indices, weight)
            gradients = (grad_values, reference.sparse_outer(values, indices, ones, D_SAE)[0])
            times = measure(
                {
                    "qscope": lambda v=values, i=indices, w=weight: forward_backward(sparse_decode, v, i, w),
                    "embedding_bag": lambda v=values, i=indices, w=weight: forward_backward(embedding_bag, v, i, w),
                },
                options.device,
                max(3, options.rounds // 4),
                lambda result, w=gradients: check_gradients(result, w),
            )
            report.add("sparse_decode", "fwd+bwd", shape, str(dtype)[6:], times)
    print(report.write())


if __name__ == "__main__":
    main()
