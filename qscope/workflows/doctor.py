"""What was found on this machine, and which backend each operator will use.

Nothing here fails when a part is missing: that is a finding.
"""

import ast
import importlib
import importlib.metadata
import inspect
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qscope._version import __version__
from qscope.errors import QscopeError
from qscope.files import cache_dir

OPERATORS = (
    "topk_encode",
    "topk_encode_certified",
    "topk_encode_packed",
    "pack_encoder",
    "topk_select",
    "sparse_decode",
    "decode_loss",
    "sparse_dot",
    "sparse_outer",
    "sparse_grads",
    "row_adam_",
    "steer_add_",
    "feature_stats_",
    "feature_penalty",
)
# Kernels in CUDA C++; where nvcc is missing Triton kernels of the same meaning run instead.
_CUDA_ONLY = {"topk_encode_certified", "topk_encode_packed", "pack_encoder"}  # the reference, without nvcc
_CUDA_CPP = {"topk_encode", "topk_select", *_CUDA_ONLY}
# On a CPU these are made of other operators, and are as native as those.
_PARTS = {"decode_loss": "sparse_decode", "sparse_grads": "sparse_outer"}
_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
)
_ISA = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "portable"}
_NO_COMPILER = "Install g++ (or name a C++20 compiler in CXX): the CPU kernels are compiled on first use."
_BUILD = "`qscope doctor --build` does it now."
_EXTRAS = {
    "cli": ("tyro", "pydantic", "tqdm"),
    "report": ("matplotlib", "pyarrow", "scipy"),
    "demo": ("gguf",),
    "post-training": ("trl", "peft", "accelerate", "datasets"),
}


@dataclass(frozen=True)
class DoctorConfig:
    """Say what was found on this machine, and which backend each operator will use."""

    build: bool = False
    """Compile the native kernels (and with an NVIDIA GPU the CUDA ones) now; otherwise their first use does it."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is empty where there is nothing to gain."""

    name: str
    value: str
    found: bool
    advice: str = ""


@dataclass(frozen=True)
class Backend:
    """What an operator runs on one kind of device."""

    operator: str
    device: str
    """`cpu` or `cuda`."""
    backend: str
    native: bool
    """False where it is the plain PyTorch reference."""


@dataclass(frozen=True)
class DoctorResult:
    """The whole report."""

    findings: list[Finding]
    backends: list[Backend]
    gpu: bool
    """Whether torch can use a GPU here."""

    @property
    def advice(self) -> list[str]:
        """What to do to get more, each thing once."""
        return list(dict.fromkeys(finding.advice for finding in self.findings if finding.advice))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and strings."""
        return asdict(self) | {"advice": self.advice}


def run(config: DoctorConfig) -> DoctorResult:
    """Look at the machine. What cannot be asked is reported as such."""
    steps: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("triton", _triton),
        ("GPU", _gpu),
        ("nvcc", _nvcc),
        ("C++ compiler", _compiler),
        ("CPU", _cpu),
        ("native CPU kernels", lambda: _native(config.build)),
        ("native CUDA kernels", lambda: _native_cuda(config.build)),
        ("transformers", lambda: [_package("transformers", "pip install 'transformers>=5.13'")]),
        ("extras", _extras),
        ("cache", _cache),
        ("settings", _settings),
    ]
    findings = [finding for name, step in steps for finding in _guarded(name, step)]
    return DoctorResult(findings, _backends(), _has_gpu())


def _guarded(name: str, step: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return step()
    except Exception as error:  # the report has to reach its end: a broken part is a finding, not a fault
        return [Finding(name, f"could not be asked: {type(error).__name__}: {_first_line(str(error))}", False)]


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else ""


def _python() -> list[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    return [
        Finding("qscope", __version__, True),
        Finding("python", f"{platform.python_version()} ({platform.python_implementation()}, {system})", True),
    ]


def _torch() -> list[Finding]:
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [Finding("torch", f"{torch.__version__}, {kind}, {torch.get_num_threads()} threads", True)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, advice: str) -> Finding:
    version = _version(name)
    return Finding(name, version or "not installed", version is not None, "" if version else advice)


def _triton() -> list[Finding]:
    version = _version("triton") or _version("pytorch-triton")
    if version:
        return [Finding("triton", version, True)]
    needed = "Install triton (a CUDA build of torch brings it): the CUDA operators are Triton kernels."
    return [Finding("triton", "not installed", False, needed if _has_gpu() else "")]


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _gpu() -> list[Finding]:
    import torch

    if not torch.version.cuda and shutil.which("nvidia-smi"):
        advice = "There is an NVIDIA driver, but torch was built without CUDA: install a CUDA build of torch."
        return [Finding("GPU", "not usable from this torch", False, advice)]
    if not torch.cuda.is_available():
        return [Finding("GPU", "none", False)]
    findings = []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        memory = f"{card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
        findings.append(Finding(f"GPU {number}", f"{card.name}, {memory}", True))
    return findings


def _ask(command: list[str]) -> str | None:
    """Standard output of a command, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=2, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def _nvcc() -> list[Finding]:
    from qscope_kernels import cuda_library

    text = _ask([cuda_library.nvcc() or "nvcc", "--version"])
    release = re.search(r"release ([\d.]+)", text or "")
    value = "not found" if text is None else f"CUDA {release.group(1)}" if release else _first_line(text)
    needed = "Install the CUDA toolkit or set CUDA_HOME: without nvcc, top-k selection runs a slower Triton kernel."
    return [Finding("nvcc", value, text is not None, needed if text is None and _has_gpu() else "")]


def _compiler() -> list[Finding]:
    from qscope import native

    command = native.compiler()
    text = None if command is None else _ask([*command, "--version"])
    if text is None:
        name = os.environ.get("CXX") or "g++"
        return [Finding("C++ compiler", f"{name} not found or does not answer", False, _NO_COMPILER)]
    return [Finding("C++ compiler", _first_line(text), True)]


def _cpu() -> list[Finding]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    have = set(flags.group(1).split()) if flags else set()
    known = [flag for flag in _CPU_FLAGS if flag in have]
    features = ", ".join(known) if known else "unknown" if not have else "none of " + ", ".join(_CPU_FLAGS)
    return [Finding("CPU", f"{name}, {cores} cores", True), Finding("CPU features", features, bool(known))]


def _extras() -> list[Finding]:
    findings = []
    for extra, names in _EXTRAS.items():
        versions = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        value = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
        advice = f"pip install 'qscope[{extra}]' adds {', '.join(missing)}." if missing else ""
        findings.append(Finding(f"extra {extra}", value, not missing, advice))
    return findings


def _cache() -> list[Finding]:
    folder = cache_dir()
    if not folder.is_dir():
        blocked = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
        if blocked is not None:
            value = f"{folder} cannot be made: {blocked} is a file"
            return [Finding("cache", value, False, "Set QSCOPE_CACHE_DIR to a folder.")]
        return [Finding("cache", f"{folder}, empty", True)]
    files = total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            files += 1
            total += os.lstat(os.path.join(parent, name)).st_size
    return [Finding("cache", f"{folder}, {total / 2**20:,.0f} MiB in {files:,} files", True)]


def _settings() -> list[Finding]:
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith("QSCOPE_")}
    return [Finding("environment", ", ".join(f"{n}={v}" for n, v in given.items()) or "no QSCOPE_ variable set", True)]


def _native(build: bool) -> list[Finding]:
    from qscope import native

    name = "native CPU kernels"
    if not (build or _compiled()):
        return [Finding(name, "not compiled yet", False, "The first use compiles the CPU kernels; " + _BUILD)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the problem is reported below
        status = native.status()
    if status.loaded:
        return [Finding(name, f"loaded, {status.isa}, QSCOPE_NATIVE={status.mode}", True)]
    return [Finding(name, f"not loaded: {status.problem}", False, _native_advice(status.mode, status.compiler))]


def _native_cuda(build: bool) -> list[Finding]:
    if not _has_gpu():
        return []
    import torch
    from qscope_kernels import cuda_library

    name = "native CUDA kernels"
    capability = torch.cuda.get_device_capability()
    if not (build or cuda_library.cached(capability)):
        return [Finding(name, "not compiled yet", False, "The first use compiles the CUDA kernels; " + _BUILD)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the problem is reported below
        loaded = cuda_library.load() is not None
    value = f"loaded, sm_{capability[0]}{capability[1]}" if loaded else f"not loaded: {cuda_library.problem()}"
    return [Finding(name, value, loaded)]


def _native_advice(mode: str, compiler: str | None) -> str:
    if mode == "off":
        return "Unset QSCOPE_NATIVE (it is off) to run the compiled CPU kernels."
    if compiler is None:
        return _NO_COMPILER
    return "The CPU kernels did not compile or load: `qscope doctor --json` shows the compiler's answer in full."


def _compiled() -> bool:
    """Whether asking for the status costs no compile: nothing to compile with, or it has been done."""
    from qscope import native

    if native.mode() == "off" or native.compiler() is None:
        return True
    return native.cached()


def _backends() -> list[Backend]:
    """Both devices for every operator, from the dispatcher's own tables."""
    try:
        importlib.import_module("qscope.ops")
    except Exception as error:  # as in _guarded: the table then says why it is empty
        reason = f"operators cannot be imported: {type(error).__name__}: {_first_line(str(error))}"
        return [Backend(operator, device, reason, False) for operator in OPERATORS for device in ("cpu", "cuda")]
    return [line for operator in OPERATORS for line in (_on_cpu(operator), _on_cuda(operator))]


def _on_cpu(operator: str) -> Backend:
    from qscope import native

    if native.implements(_PARTS.get(operator, operator), "cpu"):
        isa = native.cpu_isa()
        return Backend(operator, "cpu", f"C++, {_ISA.get(isa, isa)}", True)
    try:
        if not _compiled():
            return Backend(operator, "cpu", "C++ after its first use", True)
    except QscopeError as error:  # a wrong QSCOPE_NATIVE, on which the operators would fail as well
        return Backend(operator, "cpu", f"none: {error}", False)
    return Backend(operator, "cpu", "PyTorch reference", False)


def _on_cuda(operator: str) -> Backend:
    import torch

    own = torch._C._dispatch_has_kernel_for_dispatch_key(f"qscope::{operator}", "CUDA")
    kernels = _cuda_kernels(operator) if own else set()
    if not kernels:
        return Backend(operator, "cuda", "PyTorch reference", False)
    from qscope_kernels import cuda_library

    if operator in _CUDA_CPP and cuda_library.nvcc():
        return Backend(operator, "cuda", f"CUDA C++ ({', '.join(sorted(kernels))})", True)
    if operator in _CUDA_ONLY:
        return Backend(operator, "cuda", "PyTorch reference: there is no nvcc", False)
    if _version("triton") or _version("pytorch-triton"):
        return Backend(operator, "cuda", f"Triton ({', '.join(sorted(kernels))})", True)
    return Backend(operator, "cuda", "Triton, but triton is not installed", False)


def _cuda_kernels(operator: str) -> set[str]:
    """Modules of qscope_kernels that the function registered for CUDA imports.

    The dispatcher knows only that a function is registered, not what it runs, so its source is asked.
    """
    tree = ast.parse(inspect.getsource(importlib.import_module(f"qscope.ops.{operator}")))
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any("cuda" in ast.unparse(decorator) for decorator in function.decorator_list):
            continue
        for node in ast.walk(function):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.partition(".")[2] for name in names if name.startswith("qscope_kernels.")}
    return found
