"""qscope_kernels alone, as another trainer would take it: no part of qscope can be imported in this process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
CODE = """
import sys
sys.modules["qscope"] = None  # importing it raises
import importlib, pkgutil, torch, qscope_kernels
for module in pkgutil.iter_modules(qscope_kernels.__path__):
    importlib.import_module(f"qscope_kernels.{module.name}")

from qscope_kernels.decode_loss import decode_loss_fwd
from qscope_kernels.row_adam import row_adam_
from qscope_kernels.sparse_grads import sparse_grads_fwd

W = torch.eye(4, 16)
acts, ids = torch.tensor([[2.0, 1.0]]), torch.tensor([[3, 0]], dtype=torch.int32)
x = torch.zeros(1, 16)
out = decode_loss_fwd(acts, ids, W, None, x)
assert out.sq_err.tolist() == [5.0] and out.act_grads.tolist() == [[4.0, 2.0]]
W_dec, W_enc, b_enc, b_dec = sparse_grads_fwd(acts, out.act_grads, ids, 2 * out.error, x, 4)
assert W_dec[3, 3] == 8.0 and W_dec[3, 0] == 4.0 and b_enc.tolist() == [2.0, 0.0, 0.0, 4.0]
print("ok")
"""


def test_every_module_imports_and_a_step_runs_without_qscope():
    env = os.environ | {"PYTHONPATH": str(KERNELS), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr[-2000:]
