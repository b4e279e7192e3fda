"""The CUDA source of group_select, run on the CPU by csrc/emulator, against a stable sort of whole rows.

Threads run in a random order between barriers, shared memory is poisoned, and the inputs end at inaccessible pages.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

group_encode = pytest.importorskip("qscope_kernels.group_encode", reason="its launcher needs the triton package")

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
WRAPPER = f"""
#include "{CUDA}/group_select.cu"
extern "C" void seed(unsigned value) {{ emulator_seed(value); }}
extern "C" void* guarded(size_t bytes) {{ return emulator_guarded_alloc(bytes); }}
extern "C" void release(void* memory, size_t bytes) {{ emulator_guarded_free(memory, bytes); }}
"""
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the emulated kernel")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("group_select")
    (folder / "wrapper.cpp").write_text(WRAPPER)
    command = ["g++", "-O1", "-std=c++17", "-DQSCOPE_EMULATED", "-shared", "-fPIC", "wrapper.cpp", "-o", "lib.so"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    library = ctypes.CDLL(str(folder / "lib.so"))
    library.guarded.restype = ctypes.c_void_p
    library.guarded.argtypes = [ctypes.c_size_t]
    library.release.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def group_maxima(scores: Tensor, group: int) -> Tensor:
    """As the matrix product stores them: NaN if a score of the group is."""
    padded = torch.nn.functional.pad(scores.float(), (0, -scores.shape[1] % group), value=-torch.inf)
    return padded.view(scores.shape[0], -1, group).amax(2).bfloat16()


def select(
    library: ctypes.CDLL, scores: Tensor, k: int, group: int, relu: bool = False, seed: int = 1
) -> tuple[Tensor, Tensor]:
    rows, features = scores.shape
    values = torch.full((rows, k), 12345.0, dtype=torch.bfloat16)
    indices = torch.full((rows, k), -7, dtype=torch.int32)
    buffers = []
    for tensor in (scores.contiguous(), group_maxima(scores, group)):
        size = tensor.numel() * 2
        buffers.append((library.guarded(size), size))
        ctypes.memmove(buffers[-1][0], tensor.data_ptr(), size)
    library.seed(seed)
    status = library.qscope_group_select(
        *(ctypes.c_void_p(p) for p in (buffers[0][0], buffers[1][0], values.data_ptr(), indices.data_ptr())),
        *(ctypes.c_longlong(n) for n in (rows, features)),
        *(ctypes.c_int(n) for n in (group, k, relu)), None,
    )  # fmt: skip
    for memory, size in buffers:
        library.release(memory, size)
    assert status == 0
    return values, indices


def check(library: ctypes.CDLL, scores: Tensor, k: int, group: int, relu: bool = False, seed: int = 1) -> None:
    values, indices = select(library, scores, k, group, relu, seed)
    want = (scores.float() + 0.0).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, want.indices[:, :k].int())
    best = want.values[:, :k].relu() if relu else want.values[:, :k]
    # Compared as bits: +0, not -0.
    assert torch.equal(values.view(torch.int16), best.bfloat16().view(torch.int16))


def random_scores(rows: int, features: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, features, generator=generator)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda s: s,
    "ties": lambda s: (s * 2).round(),
    "constant": lambda s: torch.zeros_like(s),
    "signed zeros": lambda s: torch.where(s > 0, 0.0, -0.0),
    "mostly zero": lambda s: (s - 2.5).relu(),
    "negative": lambda s: -s.abs() - 1,
    "infinities": lambda s: torch.where(s > 1, torch.inf, torch.where(s < -1, -torch.inf, s)),
    "minus infinity": lambda s: torch.where(s > 2, s, -torch.inf),
    "ascending": lambda s: s.sort(dim=1).values,
    "descending": lambda s: s.sort(dim=1, descending=True).values,
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_stable_sort(library: ctypes.CDLL, kind: str) -> None:
    gen = torch.Generator().manual_seed(list(KINDS).index(kind))
    # (features, group, k): exactly k groups, one more, fewer, a short last group, one score per thread and less.
    cases = [(448, 64, 7), (512, 64, 7), (192, 64, 7), (1004, 16, 50), (4096, 64, 100), (20, 8, 20), (4, 4, 1)]
    for seed, (features, group, k) in enumerate([*cases, (5000, 16, 256), (3000, 8, 255)]):
        scores = KINDS[kind](random_scores(2, features, gen)).bfloat16()
        check(library, scores, k, group, relu=bool(seed % 2), seed=seed + 1)


@pytest.mark.parametrize("features", [16 * 1024, 16 * 1024 + 4, 16 * 6144])
def test_every_number_of_groups_per_thread(library: ctypes.CDLL, features: int) -> None:
    gen = torch.Generator().manual_seed(features)
    check(library, random_scores(1, features, gen).bfloat16(), 64, 16)
    check(library, (random_scores(1, features, gen) * 2).round().bfloat16(), 64, 16)


@pytest.mark.parametrize("k", [64, 256])
def test_more_candidates_than_the_list_holds(library: ctypes.CDLL, k: int) -> None:
    """k - 1 groups whose every score is above tau, worst first: the list is cut several times over."""
    gen = torch.Generator().manual_seed(k)
    scores = random_scores(1, 64 * 300, gen)
    scores[0, : 64 * (k - 1)] = (torch.arange(64 * (k - 1)) / 16).floor() + 100  # bfloat16 makes long ties of these
    check(library, scores.bfloat16(), k, 64)
    check(library, scores.flip(1).bfloat16(), k, 64)
    tied = torch.where(scores > 50, 1.0, 0.0)
    check(library, tied.bfloat16(), k, 64)


def test_a_nan_row(library: ctypes.CDLL) -> None:
    scores = random_scores(3, 644, torch.Generator().manual_seed(0)).bfloat16()
    scores[1, 643] = torch.nan
    values, indices = select(library, scores, 9, 64, relu=True)
    assert values[1].isnan().all() and indices[1].tolist() == list(range(9))
    for row in (0, 2):
        assert not values[row].isnan().any()
        check(library, scores[row : row + 1], 9, 64)


def test_the_order_of_threads_does_not_matter(library: ctypes.CDLL) -> None:
    scores = (random_scores(1, 2048, torch.Generator().manual_seed(5)) * 4).round().bfloat16()
    first = select(library, scores, 100, 64, seed=1)
    for seed in range(2, 12):
        again = select(library, scores, 100, 64, seed=seed)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_what_does_not_fit_is_refused(library: ctypes.CDLL) -> None:
    def status(features: int, group: int, k: int, rows: int = 0, scores: int = 0) -> int:
        pointers = [ctypes.c_void_p(p) for p in (scores, 0, 0, 0)]
        sizes = [ctypes.c_longlong(rows), ctypes.c_longlong(features)]
        return library.qscope_group_select(*pointers, *sizes, *map(ctypes.c_int, (group, k, 0)), None)

    assert status(64 * 6144, 64, 256) == 0  # no rows: checked, not launched
    refused = [(64 * 6144 + 4, 64, 256), (1026, 64, 8), (1024, 48, 8), (1024, 2, 8), (1024, 64, 0), (1024, 64, 257)]
    for case in [*refused, (128, 64, 129), (0, 64, 1), (1024, 0, 8), (2**31, 2**20, 8)]:
        assert status(*case) != 0, case
    assert status(1024, 64, 8, rows=2**31) != 0 and status(1024, 64, 8, scores=4) != 0


def test_the_launcher_passes_its_arguments_in_order(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(group_encode.cuda_library, "load", lambda: library)
    monkeypatch.setattr(group_encode.cuda_library, "stream", lambda tensor: None)
    monkeypatch.setattr(group_encode.cuda_library, "check", lambda status, name: statuses.append(status))
    scores = (random_scores(3, 1000, torch.Generator().manual_seed(9)) - 2.2).bfloat16()
    out = torch.empty(3, 70, dtype=torch.bfloat16), torch.empty(3, 70, dtype=torch.int32)
    for relu in (True, False):
        group_encode.group_select_fwd(scores, group_maxima(scores, 8), 70, 8, relu=relu, out=out)
        want = select(library, scores, 70, 8, relu)
        assert torch.equal(out[0], want[0]) and torch.equal(out[1], want[1])
    assert statuses == [0, 0] and bool((out[0] < 0).any())  # relu made a difference
    monkeypatch.setattr(group_encode.cuda_library, "load", lambda: None)
    with pytest.raises(RuntimeError, match="CUDA kernel"):
        group_encode.group_select_fwd(scores, group_maxima(scores, 8), 70, 8, relu=True, out=out)
