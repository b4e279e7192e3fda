"""Every operator once on small, odd shapes, under compute-sanitizer (make gpu-check ONLY=sanitizer).

    python scripts/gpu_small_set.py --sanitizer compute-sanitizer      runs itself under memcheck, then racecheck
    python scripts/gpu_small_set.py [--no-matmul]                      runs the operators; what the sanitizer watches

Small, because the sanitizer slows every kernel down; odd, so that the last program of every grid is partly outside. The
matrix products of cuBLAS are left out of racecheck, which would watch its kernels for minutes.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

N, D, F, K, S = 37, 263, 1031, 19, 5


def operators(matmul: bool, device: str = "cuda") -> dict[str, Callable[[], object]]:
    """Name -> a call with fresh inputs."""
    import torch

    from qscope import ops

    gen = torch.Generator().manual_seed(0)  # on the CPU: each kernel of torch would be watched as well

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(device, dtype)

    acts, ids = normal(N, K).abs(), torch.randint(0, F, (N, K), generator=gen, dtype=torch.int32).to(device)
    x, W, b_enc, b_dec, scores = normal(N, D), normal(F, D), normal(F), normal(D), normal(N, F)
    rows = {"W": normal(F, D, dtype=torch.float32), "grad": normal(F, D, dtype=torch.float32)}
    moments = [torch.zeros(F, D, device=device) for _ in range(2)]
    last, touched = torch.zeros(F, dtype=torch.int32, device=device), torch.ones(F, dtype=torch.bool, device=device)
    statistics = [torch.zeros(1, F, dtype=dtype, device=device) for dtype in
                  (torch.int64, torch.float64, torch.float64, torch.float32)]  # fmt: skip
    contexts = torch.full((F, 5), -torch.inf, device=device), torch.full((F, 5), -1, device=device)
    settings = torch.rand(S, 8, generator=gen).to(device)
    readers, gates, directions = normal(S, D), normal(S, D), normal(S, D)
    alpha, group = normal(3, S), torch.randint(-1, 3, (N,), generator=gen).to(device)
    found: dict[str, Callable[[], object]] = {
        "topk_select bfloat16": lambda: ops.topk_select(scores, K),
        "topk_select float32": lambda: ops.topk_select(scores.float(), K),
        "topk_select ties": lambda: ops.topk_select(torch.zeros_like(scores), K),
        "sparse_decode": lambda: ops.sparse_decode(acts, ids, W, b_dec),
        "sparse_dot": lambda: ops.sparse_dot(x, ids, W),
        "sparse_outer": lambda: ops.sparse_outer(acts, ids, x, F),
        "decode_loss": lambda: ops.decode_loss(acts, ids, W, b_dec, x),
        "sparse_grads": lambda: ops.sparse_grads(acts, acts.float(), ids, x, x, F),
        "row_adam_": lambda: ops.row_adam_(
            rows["W"], rows["grad"], *moments, last, touched, 1, 1e-3, unit_rows=True, shadow=W.clone()
        ),
        "feature_penalty": lambda: ops.feature_penalty(x, readers, settings[:, 0], alpha, group),
        "feature_stats_": lambda: ops.feature_stats_(acts, ids, *statistics, None, *contexts),
        "steer_add_": lambda: ops.steer_add_(x.clone(), directions, settings),
        "steer_add_ gated": lambda: ops.steer_add_(x.clone(), directions, settings, readers, gates),
    }
    if matmul:
        found["topk_encode bf16"] = lambda: ops.topk_encode(x, W, b_enc, K, "bf16")
        found["topk_encode exact"] = lambda: ops.topk_encode(x, W, b_enc, K, "exact")
        found["topk_encode_certified"] = lambda: ops.topk_encode_certified(x, W, b_enc, K)
        found["pack_encoder"] = lambda: ops.pack_encoder(W, b_enc)
        found["topk_encode_packed"] = lambda: ops.topk_encode_packed(x, ops.pack_encoder(W, b_enc), K)
    return found


def watched(tool: str) -> int:
    """Run this script under both tools; 0 if neither found anything."""
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else one large block hides accesses out of bounds
    worst = 0
    for name, arguments in (("memcheck", []), ("racecheck", ["--no-matmul"])):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__, *arguments]
        print(f"-- {name}", flush=True)
        status = subprocess.run(command, env=env).returncode
        print(f"-- {name}: {'nothing found' if status == 0 else f'FAILED, exit status {status}'}", flush=True)
        worst = worst or status
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", help="the compute-sanitizer to run this script under")
    parser.add_argument("--no-matmul", action="store_true", help="leave out what calls cuBLAS")
    options = parser.parse_args()
    if options.sanitizer:
        return watched(options.sanitizer)
    import torch

    for name, call in operators(not options.no_matmul).items():
        call()
        torch.cuda.synchronize()
        print(f"   {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
