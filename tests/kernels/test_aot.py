"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU and reads what came out.

The interpreter runs the meaning of a kernel, not its code: spills, stack use and loads that fell apart into
scalars show only here. This file is also the script that does the compiling: it runs in its own process,
because TRITON_INTERPRET=1 (which other tests need) turns `@triton.jit` functions into something that cannot
be compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Per architecture: dtype of the matrices, and whether D divides by 16.
VARIANTS = {80: (("bf16", True), ("fp32", True)), 90: (("bf16", True), ("fp32", True), ("bf16", False))}
# 128-bit loads of rows per lane in one unrolled step, for every launch configuration.
LOADS = 8
WIDE_LOAD = re.compile(r"LDG\.E\.(EF\.)?128")
DTYPES = {"bf16": 2, "fp32": 4}
# N, F, D as in Qwen-Scope's 8B shape. They choose the launch; only whether D divides by 16 reaches the
# compiler.
N, F, D = 8192, 65536, 4096


@dataclass(frozen=True)
class Spec:
    """One compilation: kernel, argument types in order, constexprs, compiler options, arguments that divide
    by 16."""

    name: str
    kernel: str
    types: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    aligned: bool
    gathers: int
    registers: int


def specs(dtype: str, aligned: bool) -> Iterator[Spec]:
    """What the launchers launch for a [N, K] batch, with the launchers' own configurations."""
    from qscope_kernels.sparse_decode import launch_config

    itemsize = DTYPES[dtype]
    width = D if aligned else D - 3
    floats, f32, i32, i64 = f"*{dtype}", "*fp32", "*i32", "*i64"
    cfg = launch_config(F, width, itemsize)
    block = {"BLOCK_D": cfg.block_d}
    unroll = {"UNROLL": cfg.unroll}
    # 64 registers x 32 threads x 32 blocks are exactly one SM's register file: more would lose resident
    # blocks.
    full = 65536 // (32 * 32)

    def spec(kernel: str, types: dict[str, str], constexprs: dict[str, Any], **rest: Any) -> Spec:
        rest = {"options": cfg.options(), "gathers": 0, "registers": full} | rest
        return Spec(
            f"{kernel}-{dtype}{'' if aligned else '-oddD'}",
            kernel,
            types,
            constexprs,
            aligned=aligned,
            **rest,
        )

    decode = dict(acts_ptr=floats, indices_ptr=i32, W_ptr=floats, b_ptr=floats, y_ptr=floats, K="i32", D="i32")
    yield spec("_sparse_decode_fwd_kernel", decode, {"HAS_BIAS": True} | block | unroll, gathers=LOADS + 1)
    dot = dict(g_ptr=floats, indices_ptr=i32, W_ptr=floats, part_ptr=f32, N="i32", K="i32", D="i32")
    yield spec("_sparse_dot_fwd_kernel", dot, block | unroll, gathers=LOADS, registers=128)
    total = dict(part_ptr=f32, out_ptr=f32, slices="i32", size="i32")
    yield spec("_sum_slices_kernel", total, {"BLOCK": 1024}, options=cfg.options() | {"num_warps": 4})

    cfg = launch_config(N, width, itemsize, wide=True)
    block = {"CHUNK": cfg.chunk, "BLOCK_D": cfg.block_d}
    lists = dict(tokens_ptr=i32, values_ptr=floats, offsets_ptr=i64)
    chunks = dict(chunk_feature_ptr=i64, first_chunk_ptr=i64)
    partial, result = dict(part_ptr=f32, part_sums_ptr=f32), dict(rows_ptr=f32, sums_ptr=f32)
    sizes = dict(F="i32", D="i32")
    outer = lists | dict(g_ptr=floats) | result | dict(D="i32")
    yield spec("_sparse_outer_fwd_kernel", outer, block | unroll, gathers=LOADS + 1)
    split = lists | chunks | dict(g_ptr=floats) | partial | sizes
    # Two more than 64 with Triton 3.6 on sm_90: 28 resident blocks, enough for the few split features.
    yield spec("_sparse_outer_split_kernel", split, block | unroll, gathers=LOADS + 1, registers=72)
    merge = dict(offsets_ptr=i64) | chunks | partial | result | sizes
    yield spec("_sparse_outer_merge_kernel", merge, block)


def rows_in_flight(code: list[str]) -> int:
    """Longest run of 128-bit global loads that no arithmetic on floats interrupts."""
    longest = run = 0
    for op in code:
        run = 0 if re.match(r"(FFMA|FADD|FMUL)", op) else run + bool(WIDE_LOAD.match(op))
        longest = max(longest, run)
    return longest


def compile_spec(spec: Spec, arch: int, cuobjdump: Path) -> dict[str, Any]:
    """Compile one kernel; return its registers, stack, shared memory and memory instructions."""
    import triton
    from qscope_kernels import sparse_decode
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(sparse_decode, spec.kernel)
    runtime = [name for name in kernel.arg_names if name not in spec.constexprs]
    assert runtime == list(spec.types), f"{spec.kernel} takes {runtime}, the test gives {list(spec.types)}"
    divisible = [["tt.divisibility", 16]]
    # As the launcher specialises them: pointers from torch are aligned, and so are sizes that divide by 16.
    attrs = {
        (i,): divisible
        for i, name in enumerate(kernel.arg_names)
        if name in spec.types and (spec.types[name][0] == "*" or (name in ("N", "D", "F", "size") and spec.aligned))
    }
    signature = {name: spec.types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=spec.constexprs, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=spec.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-sass", "-res-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", dump, re.MULTILINE)
    return {
        "name": f"{spec.name}-sm_{arch}",
        "gathers": spec.gathers if spec.aligned else 0,
        "register_limit": spec.registers if spec.aligned else 255,
        "registers": int(re.search(r"REG:(\d+)", dump).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", dump).group(1)),
        "shared": binary.metadata.shared,
        "memory": [op for op in code if re.match(r"(LD|ST|ATOM|RED\b|RED\.)", op)],
        "in_flight": rows_in_flight(code),
        "instructions": len(code),
        "triton": triton.__version__,
    }


def main(architectures: list[int]) -> None:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for arch in architectures:
        for dtype, aligned in VARIANTS[arch]:
            for spec in specs(dtype, aligned):
                print(json.dumps(compile_spec(spec, arch, cuobjdump)), flush=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton", reason="the Triton compiler is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), env.get("PYTHONPATH")]))
    command, pipes = [sys.executable, __file__], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen([*command, str(arch)], env=env, text=True, **pipes) for arch in VARIANTS]
    records = []
    for run, (out, err) in [(run, run.communicate()) for run in runs]:
        assert run.returncode == 0, err[-3000:]
        records += [json.loads(line) for line in out.splitlines()]
    return {record["name"]: record for record in records}


def test_every_kernel_of_the_package_is_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    source = (ROOT / "kernels" / "qscope_kernels" / "sparse_decode.py").read_text()
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE))
    assert {name.split("-")[0] for name in compiled} == kernels
    assert len(compiled) == len(kernels) * sum(map(len, VARIANTS.values()))


def test_no_spills_no_stack_no_atomics(
    compiled: dict[str, dict[str, Any]], record_property: Callable[[str, object], None]
) -> None:
    for name, record in compiled.items():
        record_property(name, f"{record['registers']} registers, {record['instructions']} instructions")
        assert record["stack"] == 0, name
        bad = [op for op in record["memory"] if op.startswith(("STL", "LDL", "ATOM", "RED"))]
        assert not bad, f"{name}: {bad}"


def test_registers_leave_the_intended_blocks_resident(compiled: dict[str, dict[str, Any]]) -> None:
    over = {name: r["registers"] for name, r in compiled.items() if r["registers"] > r["register_limit"]}
    assert not over


def test_gathered_rows_are_read_with_128_bit_loads(compiled: dict[str, dict[str, Any]]) -> None:
    for name, record in compiled.items():
        wide = [op for op in record["memory"] if WIDE_LOAD.match(op)]
        assert len(wide) >= record["gathers"], f"{name}: {record['memory']}"


def test_unrolled_rows_are_requested_before_the_first_is_used(compiled: dict[str, dict[str, Any]]) -> None:
    """One warp per program hides latency by its own independent loads: at least half of the 8 are issued in
    one go.

    ptxas may place the first sums between two halves; with four warps per program it left 2.
    """
    gathers = {name: record["in_flight"] for name, record in compiled.items() if record["gathers"]}
    assert {name: run for name, run in gathers.items() if run < 4} == {}
    assert len(gathers) == 4 * sum(aligned for variants in VARIANTS.values() for _, aligned in variants)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or list(VARIANTS))
