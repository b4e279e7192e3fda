"""Every Triton kernel compiled for sm_80, sm_89 and sm_90 without a GPU.

The interpreter runs the meaning of a kernel, not its code: spills, stack use, loads that fell apart into scalars
and matrix products off the tensor cores show only here.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("aot.py")
ARCHITECTURES = (80, 89, 90)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton", reason="the Triton compiler is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), env.get("PYTHONPATH")]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(arch)], env=env, text=True, **pipes)
        for arch in ARCHITECTURES
    ]
    records = []
    for run, (out, err) in [(run, run.communicate()) for run in runs]:
        assert run.returncode == 0, err[-3000:]
        records += [json.loads(line) for line in out.splitlines()]
    names = [record["name"] for record in records]
    assert len(set(names)) == len(names), "two specs share a name"
    return dict(zip(names, records, strict=True))


def test_every_kernel_is_compiled_for_every_architecture(compiled: dict[str, dict[str, Any]]) -> None:
    done = {(record["module"], record["kernel"], name.rpartition("_")[2]) for name, record in compiled.items()}
    for path in sorted((ROOT / "kernels" / "qscope_kernels").glob("*.py")):
        kernels = re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
        wanted = [90] if "sm_90 only" in path.read_text() else ARCHITECTURES
        missing = {(path.stem, kernel, str(arch)) for kernel in kernels for arch in wanted} - done
        assert not missing


def test_no_spills_no_stack_no_atomics(
    compiled: dict[str, dict[str, Any]], record_property: Callable[[str, object], None]
) -> None:
    for name, record in compiled.items():
        record_property(name, f"{record['registers']} registers, {record['instructions']} instructions")
        assert record["stack"] == 0 and not record["spills"], name
        assert record["atomics_meant"] or not record["atomics"], f"{name}: {record['atomics']}"
        # A sum of floats in the order in which programs happen to arrive would differ from run to run.
        assert not [op for op in record["atomics"] if re.search(r"\.(F16|BF16|F32|F64)", op)], name


def test_registers_leave_the_intended_blocks_resident(compiled: dict[str, dict[str, Any]]) -> None:
    over = {name: r["registers"] for name, r in compiled.items() if r["registers"] > r["register_limit"]}
    assert not over


def test_rows_are_read_with_128_bit_loads(compiled: dict[str, dict[str, Any]]) -> None:
    under = {name: r["wide_loads"] for name, r in compiled.items() if r["wide_loads"] < r["wide_loads_wanted"]}
    assert not under


def test_unrolled_rows_are_requested_before_the_first_is_used(compiled: dict[str, dict[str, Any]]) -> None:
    under = {name: r["in_flight"] for name, r in compiled.items() if r["in_flight"] < r["in_flight_wanted"]}
    assert not under
    assert any(record["in_flight_wanted"] for record in compiled.values())


def test_matrix_products_and_bulk_copies_are_what_was_meant(compiled: dict[str, dict[str, Any]]) -> None:
    assert {name: r["missing"] for name, r in compiled.items() if r["missing"]} == {}


def test_the_encoder_is_not_compiled_again_for_another_size(compiled: dict[str, dict[str, Any]]) -> None:
    """It takes seconds, and N changes with every batch."""
    records = [record for record in compiled.values() if record["kernel"] == "_group_encode_kernel"]
    assert records and all(record["unspecialised"] == ["D", "N"] for record in records)
