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


# Module scope keeps the tests of one architecture together, so that two test processes share the compilations.
@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton", reason="the Triton compiler is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), env.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPT), str(request.param)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    names = [record["name"] for record in records]
    assert len(set(names)) == len(names), "two specs share a name"
    return dict(zip(names, records, strict=True))


def test_every_kernel_is_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    (arch,) = {record["arch"] for record in compiled.values()}
    done = {(record["module"], record["kernel"]) for record in compiled.values()}
    for path in sorted((ROOT / "kernels" / "qscope_kernels").glob("*.py")):
        if arch == 90 or "sm_90 only" not in path.read_text():
            kernels = re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
            assert not {(path.stem, kernel) for kernel in kernels} - done


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
    """It takes seconds, and N changes with every batch. Only sm_90 has this kernel."""
    records = [record for record in compiled.values() if record["kernel"] == "_group_encode_kernel"]
    assert {record["arch"] for record in records} == {record["arch"] for record in compiled.values()} & {90}
    assert all(record["unspecialised"] == ["D", "N"] for record in records)
