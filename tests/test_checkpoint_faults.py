"""Checkpoint files that are damaged, hostile or of another kind, and mutated at random."""

import dataclasses
import json
import os
import pickle
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qscope import checkpoints
from qscope.checkpoints import qscope_format
from qscope.errors import CheckpointError, UnsafeCheckpointError
from qscope.sae import SAE, SAECard

GOLDEN = Path(__file__).parent / "golden"
F, D, K = 10, 6, 3
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def make(dtype: torch.dtype = torch.float32, features: int = F, width: int = D, seed: int = 0, k: int = K) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((features, width), (features, width), (features,), (width,))
    card = SAECard(model="tiny/model", layer=2, source="made", context_size=64, training={"lr": 1e-3, "steps": [1, 2]})
    return SAE(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), k=k, card=card)


def state_of(sae: SAE) -> dict[str, torch.Tensor]:
    """The dict that a Qwen-Scope file holds."""
    return {
        "W_enc": sae.W_enc.detach().clone(),
        "W_dec": sae.W_dec.detach().T.contiguous(),
        "b_enc": sae.b_enc.detach().clone(),
        "b_dec": sae.b_dec.detach().clone(),
    }


def rewrite(path: Path, change_pickle) -> None:
    """Changes data.pkl of a torch archive and gives it a right checksum, as an attacker would."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, change_pickle(data) if name.endswith("data.pkl") else data)


@pytest.fixture
def qwen_file(tmp_path) -> Path:
    return make().save(tmp_path / "layer2.sae.pt", format="qwen_scope")


# Files that are not what they should be


def save_state(path: Path, state) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is empty"),
        (b"\0" * 5000, "zeros only"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"not a checkpoint at all", "not a|header"),
    ],
    ids=["empty", "zeros", "lfs", "html", "text"],
)
@pytest.mark.parametrize("name", ["layer0.sae.pt", "x.safetensors"])
def test_files_of_another_kind(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        SAE.from_pretrained(tmp_path / name, k=K)
    assert name in str(caught.value)


def test_directory_and_unreadable_in_place_of_a_file(tmp_path):
    (tmp_path / "layer0.sae.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"is a directory"):
        SAE.from_pretrained(tmp_path, layer=0, k=K)
    with pytest.raises(CheckpointError):
        SAE.from_pretrained(os.devnull, k=K)


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_truncation_anywhere(tmp_path, format):
    written = make().save(tmp_path / "layer2.sae.pt" if format == "qwen_scope" else tmp_path, format=format)
    path = written / "sae.safetensors" if written.is_dir() else written
    whole = path.read_bytes()
    for length in random.Random(0).sample(range(1, len(whole)), 25):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            SAE.from_pretrained(written, k=K)


class Gadget:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["archive", "extra key", "bare pickle", "protocol 4", "protocol 0", "legacy"])
def test_pickle_with_code_is_never_run(tmp_path, how):
    marker, path = tmp_path / "marker", tmp_path / "layer0.sae.pt"
    gadget = Gadget(marker)
    state = state_of(make())
    if how == "archive":
        torch.save(gadget, path)
    elif how == "extra key":
        torch.save({**state, "note": gadget}, path)
    elif how == "legacy":
        torch.save({**state, "note": gadget}, path, _use_new_zipfile_serialization=False)
    else:
        protocol = {"bare pickle": 2, "protocol 4": 4, "protocol 0": 0}[how]
        path.write_bytes(pickle.dumps(gadget, protocol=protocol))
    with pytest.raises(UnsafeCheckpointError, match=rf"layer0\.sae\.pt was not opened.*{os.mkdir.__module__}\.mkdir"):
        SAE.from_pretrained(path, k=K)
    assert not marker.exists()
    pickle.loads(pickle.dumps(gadget))
    assert marker.exists(), "the gadget must work, or this test proves nothing"


def test_torch_with_known_holes_is_refused(monkeypatch, qwen_file):
    for version in ("2.9.1+cu128", "2.5.0", "1.13.1"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(CheckpointError, match=r"CVE-2025-32434.*CVE-2026-24747"):
            SAE.from_pretrained(qwen_file, k=K)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert SAE.from_pretrained(qwen_file, k=K).k == K


def change(**changes):
    """A state with entries replaced, or removed where None."""
    state = {**state_of(make()), **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (change(W_dec=None, b_dec=None), "Missing: W_dec, b_dec; unexpected: none"),
        (change(k=5, threshold=torch.zeros(F)), "Missing: none; unexpected: 'k', 'threshold'"),
        ({"state_dict": state_of(make())}, "Missing: W_enc, W_dec, b_enc, b_dec; unexpected: 'state_dict'"),
        ([torch.zeros(2)], "holds a list"),
        (change(b_dec=0.5), "b_dec is a float"),
        (
            change(W_enc=torch.ones(D, F)),
            r"W_enc has shape \[6, 10\].*ask for \[10, 6\]. It looks transposed",
        ),
        (
            change(W_dec=torch.ones(F, D)),
            r"W_dec has shape \[10, 6\].*ask for \[6, 10\]. It looks transposed",
        ),
        (change(b_enc=torch.ones(F - 1)), r"W_enc has shape \[10, 6\], but b_enc \[9\]"),
        (change(b_dec=torch.ones(D + 1)), r"b_dec \[7\] ask for \[10, 7\]"),
        (change(b_enc=torch.ones(F, 1)), "it must be a vector"),
        (change(b_enc=torch.ones(0)), "it must be a vector"),
        (change(W_enc=torch.ones(F, D, dtype=torch.int32)), "W_enc has dtype int32"),
        (change(W_enc=torch.ones(F, D).double()), "W_enc has dtype float64; accepted are float32"),
        (change(b_enc=torch.ones(F).to(torch.float8_e4m3fn)), "b_enc has dtype float8_e4m3fn"),
        (
            change(W_enc=torch.ones(F, D).index_fill(0, torch.tensor([1]), torch.nan)),
            "W_enc has 6 NaN and 0 infinite of 60",
        ),
        (
            change(W_dec=torch.ones(D, F).index_fill(0, torch.tensor([1]), -torch.inf)),
            "W_dec has 0 NaN and 10 infinite",
        ),
        (change(b_dec=torch.full((D,), torch.nan)), "b_dec has 6 NaN"),
        (change(W_enc=torch.ones(1).expand(10**9)), "W_enc claims 1000000000 elements"),
        (change(W_enc=torch.ones(1, 1).expand(10**9, D)), "W_enc claims 6000000000 elements"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_archives_with_other_content(tmp_path, state, text):
    path = save_state(tmp_path / "layer0.sae.pt", state)
    with pytest.raises(CheckpointError, match=text):
        SAE.from_pretrained(path, k=K)


def test_square_sae_transposed_by_mistake_has_another_reconstruction(tmp_path):
    """With d_sae equal to d_in the file cannot show a transposition: this states the limit of the check."""
    sae = make(features=D, width=D)
    state = state_of(sae)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    good = SAE.from_pretrained(save_state(tmp_path / "layer0.sae.pt", state), k=K)
    assert torch.equal(good(x), sae(x))
    bad = SAE.from_pretrained(
        save_state(tmp_path / "layer1.sae.pt", {**state, "W_dec": state["W_dec"].T.contiguous()}), k=K
    )
    assert not torch.allclose(bad(x), sae(x), atol=0.1)


def test_harmless_variants_of_the_archive_load(tmp_path):
    state, digest = state_of(make()), make().weight_hash()
    variants = {
        "layer0.sae.pt": {name: torch.nn.Parameter(value) for name, value in state.items()},
        "layer1.sae.pt": {**state, "W_dec": state["W_dec"].T.contiguous().T},
        "layer2.sae.pt": {name: torch.cat([value, value])[: len(value)] for name, value in state.items()},
    }
    for name, variant in variants.items():
        assert SAE.from_pretrained(save_state(tmp_path / name, variant), k=K).weight_hash() == digest
    torch.serialization.set_crc32_options(False)
    try:
        save_state(tmp_path / "layer3.sae.pt", state)
    finally:
        torch.serialization.set_crc32_options(True)
    assert SAE.from_pretrained(tmp_path / "layer3.sae.pt", k=K).weight_hash() == digest


def test_flipped_byte_in_the_weights_is_found(tmp_path, qwen_file):
    folder = make().save(tmp_path / "own")
    for path in (qwen_file, folder / "sae.safetensors"):
        data = bytearray(path.read_bytes())
        at = data.index(make().b_enc.detach().numpy().tobytes()) + 5
        data[at] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"CRC"):
        SAE.from_pretrained(qwen_file, k=K)
    with pytest.raises(CheckpointError, match=r"sha256"):
        SAE.from_pretrained(folder)


def test_archive_tricks(tmp_path, qwen_file):
    original = qwen_file.read_bytes()
    with zipfile.ZipFile(qwen_file) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(qwen_file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=r"compressed records"):
        SAE.from_pretrained(qwen_file, k=K)
    qwen_file.write_bytes(pickle.dumps({"a": 1}) + original)
    with pytest.raises(CheckpointError, match=r"bare pickle"):
        SAE.from_pretrained(qwen_file, k=K)
    qwen_file.write_bytes(original)
    # The pickle claims a longer storage than its record: torch's mapped reader would look into the
    # neighbours.
    rewrite(
        qwen_file,
        lambda data: data.replace(b"K" + bytes([F * D]) + b"t", b"K" + bytes([F * D + 8]) + b"t", 1),
    )
    with pytest.raises(CheckpointError, match=r"storage of another size|damaged"):
        SAE.from_pretrained(qwen_file, k=K)


# qscope's own format


def header(entries: str, data: bytes = b"") -> bytes:
    return len(entries.encode()).to_bytes(8, "little") + entries.encode() + data


def entry(shape, begin, end, dtype="F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def tensors_json(**changes) -> str:
    parts = {
        "W_enc": entry([2, 1], 0, 8),
        "W_dec": entry([2, 1], 8, 16),
        "b_enc": entry([2], 16, 24),
        "b_dec": entry([1], 24, 28),
    }
    return "{" + ",".join(f'"{name}":{text}' for name, text in {**parts, **changes}.items() if text) + "}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ((10**12).to_bytes(8, "little") + b"{}" * 50, "header claims 1000000000000 bytes"),
        (b"\x05\0\0", "cut off"),
        (header("{" * 40), "damaged header"),
        (header("[1]"), "a JSON object is expected"),
        (b"\x04" + b"\0" * 7 + b"\xff\xfe\xfd\xfc", "damaged header"),
        (
            header(tensors_json()[:-1] + ',"b_dec":' + entry([1], 24, 28) + "}", bytes(28)),
            "'b_dec' occurs twice",
        ),
        (header(tensors_json(b_dec=None), bytes(24)), "Missing: b_dec; unexpected: none"),
        (header(tensors_json(extra=entry([1], 28, 32)), bytes(32)), "unexpected: 'extra'"),
        (header(tensors_json(W_dec=entry([2, 1], 0, 8)), bytes(28)), "damaged"),
        (header(tensors_json(W_enc=entry([2**62, 8], 0, 8)), bytes(28)), "damaged"),
        (header(tensors_json(), bytes(40)), "damaged"),
        (header(tensors_json(), bytes(20)), "damaged"),
        (header(tensors_json(W_enc='"text"'), bytes(28)), "damaged"),
        (header(tensors_json(b_dec=entry([1], 24, 28, "I32")), bytes(28)), "b_dec has dtype I32"),
        (header(tensors_json(W_enc=entry([1, 2], 0, 8)), bytes(28)), "looks transposed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_safetensors_that_lie(tmp_path, content, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header(tensors_json(), bytes(28)))
    assert SAE.from_pretrained(path, k=1).d_sae == 2
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        SAE.from_pretrained(path, k=1)


def edit(folder: Path, seal: bool = True, **changes) -> None:
    content = json.loads((folder / "sae.json").read_text())
    content = {name: value for name, value in {**content, **changes}.items() if value != "remove"}
    if seal:
        content["card_sha256"] = qscope_format._card_hash(content)
    (folder / "sae.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format_version": 2}, "format_version 2; this qscope reads up to 1"),
        ({"format": "other"}, "not the card of a qscope SAE"),
        ({"k": "3"}, "k is '3', expected int"),
        ({"k": "remove"}, "k is missing"),
        ({"surprise": 1}, "'surprise' is unknown"),
        ({"k": 0, "layer": -1}, "layer is -1, expected at least 0; k is 0, expected at least 1"),
        ({"layer": True}, "layer is 'True', expected int or null"),
        ({"k": F + 1}, "k=11 was given, but the dictionary has d_sae=10"),
        ({"d_sae": F + 1}, "d_sae=10, but the name or card promises d_sae=11"),
        ({"sha256": "0" * 64}, "damaged or exchanged"),
        ({"k": K + 1, "seal": False}, "changed after it was written"),
    ],
    ids=str,
)
def test_cards_that_lie(tmp_path, changes, text):
    folder = make().save(tmp_path / "sae")
    edit(folder)
    assert SAE.from_pretrained(folder).card == make().card
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=text):
        SAE.from_pretrained(folder)


def test_card_that_is_not_json_or_missing_tensors(tmp_path):
    folder = make().save(tmp_path / "sae")
    for content in (b"{", b"[1]", b"\xff", b'{"k": 1, "k": 2}', b"[" * 100_000):
        (folder / "sae.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"sae\.json"):
            SAE.from_pretrained(folder)
    make().save(folder)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"No such file"):
        SAE.from_pretrained(folder)


def test_card_values_that_json_cannot_hold(tmp_path):
    for value in (float("nan"), {1, 2}, torch.ones(1)):
        sae = make()
        sae.card = dataclasses.replace(sae.card, training={"x": value})
        with pytest.raises(CheckpointError, match=r"cannot be saved as JSON"):
            sae.save(tmp_path / "sae")
    assert list((tmp_path / "sae").iterdir()) == []


# Fuzzing


def mutate(data: bytes, random_: random.Random) -> bytes:
    data, kind = bytearray(data), random_.randrange(4)
    at = random_.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << random_.randrange(8)
    elif kind == 1:
        data[at] = random_.choice([0, 1, 0x7F, 0x80, 0xFF])
    elif kind == 2:
        del data[at : at + random_.randrange(1, 9)]
    else:
        data[at:at] = random_.randbytes(random_.randrange(1, 9))
    return bytes(data)


def outcome(path: Path, whole: str) -> bool:
    """True if the mutant loaded, as exactly the same SAE. Any exception but CheckpointError fails the
    test."""
    try:
        sae = SAE.from_pretrained(path, k=K)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return False
    assert sae.weight_hash() == whole
    return True


@pytest.mark.parametrize("name", ["layer2.sae.pt", "sae.safetensors", "sae.json"])
def test_mutated_files_give_checkpoint_errors_or_the_same_sae(tmp_path, name):
    random_, whole = random.Random(name), make().weight_hash()
    written = make().save(
        tmp_path / name if name.endswith(".pt") else tmp_path,
        "qwen_scope" if name.endswith(".pt") else "qscope",
    )
    original = (tmp_path / name).read_bytes()
    loaded = 0
    for _ in range(300):
        (tmp_path / name).write_bytes(mutate(original, random_))
        loaded += outcome(written, whole)
    assert loaded < 150, "most mutations must be noticed"
    (tmp_path / name).write_bytes(original)
    assert outcome(written, whole)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:invalid escape sequence")
def test_mutated_pickles_with_right_checksums(qwen_file):
    """Past the checksums the structure decides; values may differ then, exceptions may not."""
    random_, original = random.Random(3), qwen_file.read_bytes()
    for _ in range(300):
        qwen_file.write_bytes(original)
        rewrite(qwen_file, lambda data: mutate(data, random_))
        try:
            sae = SAE.from_pretrained(qwen_file, k=K)
        except CheckpointError:
            continue
        assert (sae.d_sae, sae.d_in) == (F, D)


def test_mutated_headers_without_a_card(tmp_path):
    random_, path = random.Random(4), tmp_path / "x.safetensors"
    save_file({name: getattr(make(), name).detach() for name in NAMES}, str(path))
    original = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutate(original[:400], random_) + original[400:])
        try:
            SAE.from_pretrained(path, k=K)
        except CheckpointError:
            continue
