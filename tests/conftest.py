import contextlib
import os

import pytest
import torch

# Inductor imports it late, and it refuses once the standard distutils is loaded. A GPU machine may not have it.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any @triton.jit is decorated
torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN (integers: the maximum)


@pytest.fixture
def limit_isa():
    """Lower the instruction set of the CPU kernels for one test: limit_isa("portable")."""
    from qscope import native

    yield native.cpu_isa
    native.cpu_isa("avx512")
