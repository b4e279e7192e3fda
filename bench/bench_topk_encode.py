"""python bench/bench_topk_encode.py: the encoder against linear + torch.topk, and the select alone."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "kernels"),
]

from _harness import Report, arguments, measure  # noqa: E402  (the path set above spares an install)

from qscope.ops import topk_encode, topk_select  # noqa: E402

D, D_SAE, K = 2048, 32768, 50


def check(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, precision: str) -> None:
    """Ours must be a top-k of the float32 scores: values right, nothing left out that lies above."""
    scores = F.linear(x.float(), W.float(), b.float())
    values, indices = topk_encode(x, W, b, K, precision)
    tolerance = 1e-4 if precision == "exact" else 2e-2 * scores.abs().max().item()
    torch.testing.assert_close(values.float(), scores.gather(1, indices.long()).relu(), rtol=0, atol=tolerance)
    unchosen = scores.scatter(1, indices.long(), -torch.inf)
    assert (unchosen <= values[:, -1:].float() + tolerance).all()


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
            check(x, weight, bias, precision)
            times = measure(
                {
                    "qscope": lambda x=x, W=weight, b=bias, p=precision: topk_encode(x, W, b, K, p),
                    "torch linear+topk": lambda x=x, W=weight, b=bias: F.linear(x, W, b).topk(K),
                },
                options.device,
                options.rounds if N > 64 else 3 * options.rounds,
            )
            report.add("topk_encode", precision, dict(N=N, D=D, F=D_SAE, K=K), str(dtype)[6:], times)
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.randn(256, D_SAE, device=options.device).to(dtype)
        assert torch.equal(topk_select(scores, K)[0], scores.topk(K).values)
        times = measure(
            {"qscope": lambda s=scores: topk_select(s, K), "torch topk": lambda s=scores: s.topk(K)},
            options.device,
            5 * options.rounds,
        )
        report.add("topk_select", "fwd", dict(N=256, F=D_SAE, K=K), str(dtype)[6:], times)
    print(report.write())


if __name__ == "__main__":
    main()
