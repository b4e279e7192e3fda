import contextlib
import os

import pytest

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:  # there is one per core; torch reads this when it is imported
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402  (after the setting above)

# Inductor imports it late, and it refuses once the standard distutils is loaded. A GPU machine may not have it.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any @triton.jit is decorated
torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN (integers: the maximum)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the option in the same hook
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in a process per core where pytest-xdist is installed (-n 0: in one), named files in one."""
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if named or IN_WORKER or not config.pluginmanager.hasplugin("xdist") or torch.cuda.is_available():
        return
    if config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = min(os.cpu_count() or 1, 4)  # each holds torch and, at times, the embedded model
        config.option.dist = "worksteal"  # files stay together until a process has none left


@pytest.fixture
def limit_isa():
    """Lower the instruction set of the CPU kernels for one test: limit_isa("portable")."""
    from qscope import native

    yield native.cpu_isa
    native.cpu_isa("avx512")
