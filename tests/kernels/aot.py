"""Compiles Triton kernels ahead of time, without a GPU, and reads the machine code.

    PYTHONPATH=kernels python tests/kernels/aot.py 90 [sparse_decode ...]

prints one JSON line per compilation. aot_specs/<module>.py lists what the launchers of qscope_kernels/<module>.py
launch. It runs in its own process: TRITON_INTERPRET=1, which other tests need, turns `@triton.jit` functions into
something that cannot be compiled.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECS = Path(__file__).parent / "aot_specs"
WIDE_LOAD = re.compile(r"LDG\.E\.(EF\.)?128")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Spec:
    """One compilation of one kernel, and what its machine code must look like.

    types: run-time arguments in order, as Triton writes them ("*bf16", "i32"). divisible: integer arguments that
    are multiples of 16 at this launch (pointers always are). registers: upper limit per thread. wide_loads: least
    number of 128-bit global loads. in_flight: how many of them are issued before the first float arithmetic.
    instructions: patterns that must occur, such as "HGMMA". atomics: whether integer atomics are meant.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    divisible: tuple[str, ...] = ()
    registers: int = 255
    wide_loads: int = 0
    in_flight: int = 0
    instructions: tuple[str, ...] = ()
    atomics: bool = False


def loads_in_flight(code: list[str]) -> int:
    """Longest run of 128-bit global loads that no arithmetic on floats interrupts."""
    longest = run = 0
    for op in code:
        run = 0 if re.match(r"(FFMA|FADD|FMUL)", op) else run + bool(WIDE_LOAD.match(op))
        longest = max(longest, run)
    return longest


def compile_spec(spec: Spec, arch: int) -> Any:
    """Compile one kernel to what triton.compile returns."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = spec.kernel
    runtime = [name for name in kernel.arg_names if name not in spec.constexprs]
    assert runtime == list(spec.types), f"{spec.name} takes {runtime}, the spec gives {list(spec.types)}"
    unspecialised = {param.name for param in kernel.params if param.do_not_specialize}
    assert not unspecialised & set(spec.divisible), f"{spec.name}: no launch tells the compiler that"
    aligned = [
        (i,)
        for i, name in enumerate(kernel.arg_names)
        if name in spec.divisible or spec.types.get(name, "").startswith("*")
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: spec.types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=spec.constexprs,
        attrs={key: [["tt.divisibility", 16]] for key in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=spec.options)


def examine(spec: Spec, arch: int, binary: Any) -> dict[str, Any]:
    """Registers, stack and shared memory of a compiled kernel, and what its code is made of."""
    import triton

    unspecialised = {param.name for param in spec.kernel.params if param.do_not_specialize}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        # `cuobjdump -sass` prints the same code and takes a third longer, for an analysis that is not read here.
        code = INSTRUCTION.findall(_output(tools / "nvdisasm", "-c", "-ndf", file.name))
    assert code, f"{spec.name}: nvdisasm printed no code"
    return {
        "name": f"{spec.name}-sm_{arch}",
        "arch": arch,
        "kernel": spec.kernel.__name__,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "register_limit": spec.registers,
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": binary.metadata.shared,
        "spills": [op for op in code if op.startswith(("STL", "LDL"))],
        "atomics": sorted({op for op in code if re.match(r"(ATOM|RED\.|RED$|REDG)", op)}),
        "atomics_meant": spec.atomics,
        "wide_loads": sum(bool(WIDE_LOAD.match(op)) for op in code),
        "wide_loads_wanted": spec.wide_loads,
        "in_flight": loads_in_flight(code),
        "in_flight_wanted": spec.in_flight,
        "missing": [want for want in spec.instructions if not any(re.match(want, op) for op in code)],
        "instructions": len(code),
        "unspecialised": sorted(unspecialised),
        "triton": triton.__version__,
    }


def _output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def modules() -> list[str]:
    return sorted(path.stem for path in SPECS.glob("*.py"))


def specs(module: str, arch: int) -> Iterator[Spec]:
    """The specs of one module of qscope_kernels."""
    if str(SPECS.parent) not in sys.path:
        sys.path.insert(0, str(SPECS.parent))
    yield from importlib.import_module(f"aot_specs.{module}").specs(arch)


def main(arch: int, wanted: list[str]) -> None:
    with ThreadPoolExecutor(1) as pool:  # a kernel is disassembled while the next one is compiled
        found = [
            (module, pool.submit(examine, spec, arch, compile_spec(spec, arch)))
            for module in wanted or modules()
            for spec in specs(module, arch)
        ]
    for module, record in found:
        print(json.dumps({"module": module} | record.result()))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
