"""Autocast changes no operator: not called by name, not in a backward pass, not compiled, not in a plain body."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qscope import native, ops

ROOT = Path(__file__).parents[1]
DTYPES = [torch.bfloat16, torch.float16]


def cases():
    """For each operator, the positions of the arguments that have a gradient."""
    torch.manual_seed(0)
    x, W, b = torch.randn(7, 24), torch.randn(60, 24), torch.randn(60)
    values, indices = torch.rand(7, 5), torch.randint(0, 60, (7, 5))
    return [
        ("topk_select", (torch.randn(7, 60), 5), (0,)),
        ("topk_encode", (x, W, b, 5, "exact"), (0, 1, 2)),
        ("topk_encode", (x, W, b, 5, "bf16"), (0, 1, 2)),
        ("topk_encode", (x, W, None, 5, "bf16"), (0, 1)),
        ("sparse_decode", (values, indices, W, torch.randn(24)), (0, 2, 3)),
        ("sparse_dot", (x, indices, W), ()),
        ("sparse_outer", (values, indices, x, 60), ()),
    ]


CASES = cases()
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]


def results(function, args, leaves):
    """Outputs, then gradients."""
    args = [a.clone().requires_grad_(i in leaves) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
    outputs = function(*args)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    if leaves:
        outputs[0].float().square().sum().backward()
    return [*(o.detach() for o in outputs), *(args[i].grad for i in leaves)]


def assert_same_under_autocast(function, want, args, leaves, dtype):
    with torch.autocast("cpu", dtype):
        got = results(function, args, leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)  # dtypes too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, args, leaves", CASES, ids=IDS)
def test_eager(name, args, leaves, dtype):
    want = results(getattr(ops, name), args, leaves)
    assert_same_under_autocast(getattr(ops, name), want, args, leaves, dtype)
    assert_same_under_autocast(getattr(torch.ops.qscope, name), want, args, leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, args, leaves", CASES, ids=IDS)
def test_compiled(name, args, leaves, dtype):
    op = getattr(ops, name)
    torch._dynamo.reset()  # every case compiles the same line, and there is a limit on that
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    assert_same_under_autocast(compiled, results(op, args, leaves), args, leaves, dtype)


def test_autocast_goes_on_after_the_call():
    a = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        ops.topk_select(a, 2)
        assert (a @ a).dtype == torch.bfloat16


def test_opcheck_under_autocast():
    x, W, b = (t.clone().requires_grad_() for t in CASES[1][1][:3])
    with torch.autocast("cpu", torch.bfloat16):
        torch.library.opcheck(torch.ops.qscope.topk_encode.default, (x, W, b, 3, "exact"))


@pytest.mark.skipif(native.mode() == "off", reason="this whole run is the plain PyTorch one already")
def test_the_plain_bodies_too():
    env = {**os.environ, "QSCOPE_NATIVE": "off", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "eager", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
