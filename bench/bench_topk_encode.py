"""python bench/bench_topk_encode.py: the encoder against linear + torch.topk, and the select alone."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "kernels"),
]

from _harness import Report, arguments, measure  # noqa: E402  (the path set above spares an install)

from qscope.ops import topk_encode, topk_select  # noqa: E402

D, D_SAE, K = 2048, 32768, 50


def check(result: tuple[Tensor, Tensor], scores: Tensor) -> None:
    """A result must be a top-k of the float32 scores: values right, nothing left out that lies above.

    The tolerance is the one of the dtype in which the scores were ranked. No relu: at these shapes all of the K
    largest scores are positive, for every provider.
    """
    values, indices = result[0].float(), result[1].long()
    tolerance = 1e-4 if result[0].dtype == torch.float32 else 2e-2 * scores.abs().max().item()
    torch.testing.assert_close(values, scores.gather(1, indices), rtol=0, atol=tolerance)
    assert (scores.scatter(1, indices, -torch.inf) <= values[:, -1:] + tolerance).all()


def main() -> None:
    options = arguments(__doc__, rounds=9)
    report = Report("topk_encode", options.device)
    torch.manual_seed(0)
    W = torch.randn(D_SAE, D, device=options.device) / D**0.5
    b = torch.randn(D_SAE, device=options.device) * 0.1
    for dtype, precision in ((torch.float32, "exact"), (torch.bfloat16, "bf16"), (torch.bfloat16, "exact")):
        weight, bias = W.to(dtype), b.to(dtype)
        for N in (1, 8, 64, 512):
            x = torch.randn(N, D, device=options.device).to(dtype)
            scores = F.linear(x.float(), weight.float(), bias.float())
            times = measure(
                {
                    "qscope": lambda x=x, W=weight, b=bias, p=precision: topk_encode(x, W, b, K, p),
                    "torch linear+topk": lambda x=x, W=weight, b=bias: F.linear(x, W, b).topk(K),
                },
                options.device,
                options.rounds if N > 64 else 3 * options.rounds,
                lambda result, s=scores: check(result, s),
            )
            report.add("topk_encode", precision, dict(N=N, D=D, F=D_SAE, K=K), str(dtype)[6:], times)
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.randn(256, D_SAE, device=options.device).to(dtype)
        want = scores.sort(dim=1, descending=True).values[:, :K]
        times = measure(
            {"qscope": lambda s=scores: topk_select(s, K), "torch topk": lambda s=scores: s.topk(K)},
            options.device,
            5 * options.rounds,
            lambda result, w=want: torch.testing.assert_close(result[0], w, rtol=0, atol=0),
        )
        report.add("topk_select", "fwd", dict(N=256, F=D_SAE, K=K), str(dtype)[6:], times)
    print(report.write())


if __name__ == "__main__":
    main()
