"""The house of docs/DESIGN.md: each floor imports only from floors below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# First match wins. A module imports modules of a lower floor, or of its own package.
FLOORS = [
    ("qscope_kernels", -1),  # usable without qscope, so even the ground floor may build on it
    ("qscope._version", 0),
    ("qscope.errors", 0),
    ("qscope.files", 0),
    ("qscope.reference", 0),
    ("qscope.native", 0),
    ("qscope.ops", 1),
    ("qscope.checkpoints", 2),
    ("qscope.sae", 2),
    ("qscope.model", 3),
    ("qscope.data", 3),
    ("qscope.store", 3),  # and store_format, store_writer, store_export
    ("qscope.corpus", 3),  # and corpus_debian, corpus_labelled
    ("qscope.journal", 3),
    ("qscope.records", 3),
    ("qscope.endpoint", 2.9),
    ("qscope.question_sets", 3),
    ("qscope.packages", 3),
    ("qscope.embedded", 3),
    ("qscope.activation_store", 3),
    ("qscope.distributed", 3),
    ("qscope.evaluation", 3),
    ("qscope.detectors", 3),
    ("qscope.training", 3.5),  # made of the parts of floor 3, and what the workflows are made of
    ("qscope.steering", 3.5),
    ("qscope.finding", 3.5),
    ("qscope.coverage", 3.6),  # built on finding's codes and scores
    ("qscope.classification", 3.6),
    ("qscope.post_training", 3.6),
    ("qscope.explaining", 3.6),
    ("qscope.synthesis", 3.65),  # of explanations and rules
    ("qscope.vllm_plugin", 3.7),  # steering inside another engine
    ("qscope.workflows", 4),
    ("qscope.report", 5),
    ("qscope.cli", 5),
    ("qscope.__main__", 5),
    ("qscope", 6),
]
THIRD_PARTY = {
    "qscope_kernels": {"torch", "triton", "filelock"},
    "core": {"torch", "numpy", "safetensors", "filelock"},
}


def sources():
    for base in (ROOT / "qscope", ROOT / "kernels" / "qscope_kernels"):
        yield from sorted(base.rglob("*.py"))


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> int:
    return next(f for prefix, f in FLOORS if module == prefix or module.startswith((prefix + ".", prefix + "_")))


def imports(path: Path, top_level_only: bool = False):
    """Modules that a file imports; `from package import name` counts as package.name where that is a module."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if top_level_only:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node):
                skipped.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                places = [base / full.replace(".", "/") for base in (ROOT, ROOT / "kernels")]
                yield full if any(p.with_suffix(".py").exists() or p.is_dir() for p in places) else node.module


def _is_type_checking(node) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


@pytest.mark.parametrize("path", list(sources()), ids=module_name)
def test_imports_go_downward(path):
    me = module_name(path)
    if me == "qscope":
        return  # the front door resolves names lazily
    for name in imports(path):
        if name.split(".")[0] not in ("qscope", "qscope_kernels"):
            continue
        same_package = name.rpartition(".")[0] == me.rpartition(".")[0] or name.startswith(me + ".")
        assert floor(name) < floor(me) or (floor(name) == floor(me) and (same_package or floor(me) in (2, 4, 5))), (
            f"{me} (floor {floor(me)}) imports {name} (floor {floor(name)})"
        )


@pytest.mark.parametrize("path", list(sources()), ids=module_name)
def test_core_needs_only_its_few_dependencies(path):
    """Importing the core must not need tyro, tqdm, pydantic, pyarrow or the Hub."""
    me = module_name(path)
    allowed = THIRD_PARTY["qscope_kernels" if me.startswith("qscope_kernels") else "core"]
    if floor(me) > 3 and me != "qscope":
        return
    if me == "qscope.store_format":
        allowed = allowed | {"pydantic"}  # imported by the store when one is opened
    stdlib = __import__("sys").stdlib_module_names
    for name in imports(path, top_level_only=True):
        top = name.split(".")[0]
        assert top in allowed or top in stdlib or top in ("qscope", "qscope_kernels"), f"{me} imports {top}"


def test_the_rule_can_fail():
    assert floor("qscope.ops.topk_encode") == 1
    assert floor("qscope.store_writer") == 3
    assert floor("qscope.workflows.encode") > floor("qscope.sae") > floor("qscope.ops")
