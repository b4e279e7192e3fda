"""Checkpoint formats: golden files, round trips, names, the Hub, and writes that fail."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file

from qscope import checkpoints
from qscope.checkpoints import registry
from qscope.errors import CheckpointError, InputError, StorageError
from qscope.sae import SAE, SAECard

GOLDEN = Path(__file__).parent / "golden"
F, D, K = 10, 6, 3
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def make(dtype: torch.dtype = torch.float32, features: int = F, width: int = D, seed: int = 0, k: int = K) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((features, width), (features, width), (features,), (width,))
    card = SAECard(model="tiny/model", layer=2, source="made", context_size=64, training={"lr": 1e-3, "steps": [1, 2]})
    return SAE(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), k=k, card=card)


@pytest.fixture
def qwen_file(tmp_path) -> Path:
    return make().save(tmp_path / "layer2.sae.pt", format="qwen_scope")


@pytest.mark.parametrize("where", ["qscope", "qscope/sae.safetensors", "qwen_scope", "qwen_scope/layer2.sae.pt"])
def test_golden_reconstruction_is_exact(where):
    # The golden values are multiples of 1/8, so that float32 has no rounding and equality is the right test.
    expected = json.loads((GOLDEN / "expected.json").read_text())
    sae = SAE.from_pretrained(GOLDEN / where, layer=2, k=2)
    top = sae.encode_topk(torch.tensor(expected["x"]))
    assert top.top_acts.tolist() == expected["top_acts"]
    assert [ids for ids, acts in zip(top.top_indices.tolist(), expected["top_acts"], strict=True) if min(acts) > 0] == [
        ids for ids, acts in zip(expected["top_indices"], expected["top_acts"], strict=True) if min(acts) > 0
    ]
    assert sae(torch.tensor(expected["x"])).tolist() == expected["x_hat"]
    assert (sae.card.layer, sae.card.hook_point, sae.k) == (2, "model.layers.2", 2)
    assert not any(parameter.requires_grad for parameter in sae.parameters()) and not sae.training


@pytest.mark.parametrize("format", checkpoints.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bit_equal(tmp_path, format, dtype):
    sae = make(dtype)
    written = sae.save(
        tmp_path / "layer2.sae.pt" if format == "qwen_scope" else tmp_path / "new" / "sae", format=format
    )
    again = SAE.from_pretrained(written, k=K, dtype=dtype)
    assert again.weight_hash() == sae.weight_hash()
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), sae(x))
    upcast = SAE.from_pretrained(written, k=K)
    assert upcast.dtype == torch.float32 and torch.equal(upcast.W_dec, sae.W_dec.float())
    assert upcast.W_dec.is_contiguous() and upcast.card.dtype == "float32"
    if format == "qscope":
        assert again.card == sae.card
    files = [path for path in written.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if ".tmp" in path.name or path.name.endswith(".new")]


def test_equal_saes_give_equal_files(tmp_path):
    for folder in ("a", "b"):
        make().save(tmp_path / folder)
        make().save(tmp_path / folder, format="qwen_scope")
    for name in ("sae.safetensors", "sae.json", "layer2.sae.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_file_holds_what_the_format_says(tmp_path):
    sae = make()
    state = torch.load(sae.save(tmp_path, format="qwen_scope"), weights_only=True)
    assert list(state) == list(NAMES) and torch.equal(state["W_dec"], sae.W_dec.T) and state["W_dec"].is_contiguous()
    tensors = load_file(sae.save(tmp_path) / "sae.safetensors")
    assert torch.equal(tensors["W_dec"], sae.W_dec) and sorted(tensors) == sorted(NAMES)


def test_tied_and_sliced_weights_are_saved_whole(tmp_path):
    big = torch.randn(1000, D)
    sae = SAE(big[:F], big[:F], torch.zeros(1000)[:F], torch.zeros(D), K, SAECard(layer=0))
    for format in checkpoints.FORMATS:
        folder = sae.save(tmp_path / format / "layer0.sae.pt" if format == "qwen_scope" else tmp_path / format, format)
        assert SAE.from_pretrained(folder, k=K).weight_hash() == sae.weight_hash()
    assert (tmp_path / "qwen_scope" / "layer0.sae.pt").stat().st_size < 4000, "a slice must not bring its storage along"


# Names: k, layer, model


def released_like(folder: Path, name: str = "SAE-Res-Tiny-W1K-L0_5", layers=(0, 3)) -> Path:
    for layer in layers:
        sae = make(features=1024, width=D, seed=layer, k=5)
        sae.card.layer = layer
        sae.save(folder / name, format="qwen_scope")
    return folder / name


def test_k_and_layer_come_from_the_names(tmp_path):
    folder = released_like(tmp_path)
    for path in (folder, folder / "layer3.sae.pt"):
        sae = SAE.from_pretrained(path, layer=3)
        assert (sae.k, sae.card.layer, sae.card.model, sae.card.source) == (5, 3, "Tiny", "layer3.sae.pt")
    assert SAE.from_pretrained(folder / "layer0.sae.pt").card.layer == 0
    with pytest.raises(
        CheckpointError,
        match=r"k=5 according to the name SAE-Res-Tiny-W1K-L0_5, but k=7 according to the argument",
    ):
        SAE.from_pretrained(folder, layer=3, k=7)
    with pytest.raises(CheckpointError, match=r"no layer was given, but .* has the layers 0, 3"):
        SAE.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"layer 1 was given, but .* has the layers 0, 3"):
        SAE.from_pretrained(folder, layer=1)
    with pytest.raises(
        CheckpointError, match=r"layer=3 according to the file name .*layer=0 according to the argument"
    ):
        SAE.from_pretrained(folder / "layer3.sae.pt", layer=0)


def test_name_that_promises_another_width(tmp_path):
    released_like(tmp_path).rename(tmp_path / "SAE-Res-Tiny-W2K-L0_5")
    with pytest.raises(CheckpointError, match=r"have d_sae=1024, but the name or card promises d_sae=2048"):
        SAE.from_pretrained(tmp_path / "SAE-Res-Tiny-W2K-L0_5", layer=0)
    with pytest.raises(CheckpointError, match=r"promises k=5 and d_sae=2048, but this SAE has k=3 and d_sae=10"):
        make().save(tmp_path / "SAE-Res-Tiny-W2K-L0_5", format="qwen_scope")


def test_missing_or_impossible_k(qwen_file):
    with pytest.raises(CheckpointError, match=r"Give k"):
        SAE.from_pretrained(qwen_file)
    for k in (0, -3, F + 1):
        with pytest.raises(CheckpointError, match=rf"k={k} was given"):
            SAE.from_pretrained(qwen_file, k=k)
    for k in (2.0, True, "3"):
        with pytest.raises(CheckpointError, match=r"k must be a whole number"):
            SAE.from_pretrained(qwen_file, k=k)


def test_card_wins_over_contradicting_arguments(tmp_path):
    folder = make().save(tmp_path / "sae")
    with pytest.raises(CheckpointError, match=r"k=4 was given, but the card .* says k=3"):
        SAE.from_pretrained(folder, k=4)
    with pytest.raises(CheckpointError, match=r"layer=2 according to the card .* but layer=1"):
        SAE.from_pretrained(folder, layer=1)
    assert SAE.from_pretrained(folder, layer=2, k=3).card.context_size == 64


def test_one_folder_per_layer_and_a_layer_for_a_card_without(tmp_path):
    sae = make()
    sae.card = dataclasses.replace(sae.card, layer=None, hook_point=None)
    sae.save(tmp_path / "layer7")
    assert SAE.from_pretrained(tmp_path, layer=7).card.hook_point == "model.layers.7"
    with pytest.raises(CheckpointError, match=r"needs to know the layer"):
        sae.save(tmp_path, format="qwen_scope")
    with pytest.raises(CheckpointError, match=r"names layer 5, but this SAE's card says layer 2"):
        make().save(tmp_path / "layer5.sae.pt", format="qwen_scope")


def test_lone_safetensors_file_needs_k(tmp_path):
    path = make().save(tmp_path / "sae") / "sae.safetensors"
    path.rename(tmp_path / "lone.safetensors")
    assert SAE.from_pretrained(tmp_path / "lone.safetensors", k=K, layer=4).weight_hash() == make().weight_hash()
    with pytest.raises(CheckpointError, match=r"Give k"):
        SAE.from_pretrained(tmp_path / "lone.safetensors")


def test_names_of_nothing(tmp_path):
    for name in ("/nowhere/sae", "nowhere", "a/b/c", "folder/file.pt", "", "bad name/x"):
        with pytest.raises(CheckpointError):
            SAE.from_pretrained(name if name else tmp_path / "none")
    (tmp_path / "ae.pt").write_bytes(b"x")
    with pytest.raises(
        CheckpointError,
        match=r"dictionary_learning, which this version cannot read.*exist now: qscope.*qwen_scope",
    ):
        SAE.from_pretrained(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"accepted are .pt"):
        SAE.from_pretrained(tmp_path / "x.bin")
    with pytest.raises(
        CheckpointError, match=r"'sae_lens' was asked for; formats that qscope writes now: qscope, qwen_scope"
    ):
        make().save(tmp_path, format="sae_lens")
    with pytest.raises(CheckpointError, match=r"writes a folder"):
        make().save(tmp_path / "a.safetensors")


def test_device_and_dtype_are_checked_first(tmp_path):
    for arguments, text in [
        ({"dtype": torch.float64}, "'float64' was asked for"),
        ({"dtype": "int8"}, "'int8' was asked for"),
        ({"device": "warp"}, "'warp' is not one that torch knows"),
        ({"device": "cuda:99"}, "'cuda:99' was asked for"),
    ]:
        with pytest.raises(InputError, match=text):
            SAE.from_pretrained(tmp_path / "none", **arguments)
    assert SAE.from_pretrained(GOLDEN / "qscope", dtype="bfloat16", device="cpu").dtype == torch.bfloat16


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one file per download, which records what was asked for."""
    calls = []

    def download(repo_id, filename, **_):
        calls.append((repo_id, filename))
        return str(tmp_path / "files" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


@pytest.mark.parametrize("name", ["Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"])
def test_hub_name_of_a_released_group(hub, tmp_path, monkeypatch, name):
    group = registry.find(name)
    small = group._replace(d_model=D)
    monkeypatch.setattr(registry, "GROUPS", tuple(small if item is group else item for item in registry.GROUPS))
    sae = make(features=32768, width=D, k=50)
    sae.card.layer = 20
    sae.save(tmp_path / "files", format="qwen_scope")
    loaded = SAE.from_pretrained(name, layer=20)
    assert hub == [("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer20.sae.pt")]
    assert loaded.weight_hash() == sae.weight_hash()
    assert loaded.card.model == "Qwen/Qwen3-1.7B-Base" and loaded.card.hook_point == "model.layers.20"
    assert loaded.card.source == "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer20.sae.pt"
    monkeypatch.setattr(registry, "GROUPS", tuple(group if item is small else item for item in registry.GROUPS))
    with pytest.raises(CheckpointError, match=r"have d_in=6, but the name or card promises d_in=2048"):
        SAE.from_pretrained(name, layer=20)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", {"layer": 36}, "layers 0 to 35"),
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", {"layer": -1}, "layers 0 to 35"),
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", {}, "needs a layer: it has layers 0 to 35"),
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", {"layer": 3, "k": 100}, "k=50 .* but k=100"),
        ("Qwen/SAE-Res-Qwen3-30B-A3B-Base-W32K-L0_100", {"layer": 3}, "W128K-L0_100"),
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K", {"layer": 3}, "not a released"),
        ("someone/SAE-Res-Other-W1K-L0_5", {}, "one file per layer"),
    ],
)
def test_wrong_names_are_refused_before_any_download(hub, name, arguments, text):
    with pytest.raises(CheckpointError, match=text):
        SAE.from_pretrained(name, **arguments)
    assert hub == []


def test_own_format_and_other_owners_on_the_hub(hub, tmp_path):
    make().save(tmp_path / "files")
    assert SAE.from_pretrained("someone/my-sae").weight_hash() == make().weight_hash()
    assert hub == [("someone/my-sae", "sae.json"), ("someone/my-sae", "sae.safetensors")]
    released_like(tmp_path).rename(tmp_path / "moved")
    (tmp_path / "files" / "layer3.sae.pt").write_bytes((tmp_path / "moved" / "layer3.sae.pt").read_bytes())
    assert SAE.from_pretrained("someone/SAE-Res-Tiny-W1K-L0_5", layer=3).k == 5


def test_damaged_download_is_told_by_the_name_of_its_blob(monkeypatch, tmp_path):
    folder = released_like(tmp_path)
    blob = tmp_path / "cache" / "blobs" / ("0" * 64)
    blob.parent.mkdir(parents=True)
    (folder / "layer3.sae.pt").rename(blob)
    link = tmp_path / "cache" / "snapshots" / "layer3.sae.pt"
    link.parent.mkdir()
    link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, filename: str(link))
    with pytest.raises(CheckpointError, match=r"the download is damaged"):
        SAE.from_pretrained("someone/SAE-Res-Tiny-W1K-L0_5", layer=3)


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("offline\n\nlong advice"),
        huggingface_hub.errors.OfflineModeIsEnabled("offline\nlong advice"),
        huggingface_hub.errors.HFValidationError("offline\nlong advice"),
        ConnectionError("offline\nlong advice"),
        RuntimeError("offline\nlong advice"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_errors_are_one_paragraph(monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=r"layer3\.sae\.pt of Qwen/.* could not be fetched .*offline") as caught:
        SAE.from_pretrained("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", layer=3)
    assert "\n" not in str(caught.value) and "long advice" not in str(caught.value)


def test_hub_client_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"huggingface_hub is not installed"):
        SAE.from_pretrained("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", layer=3)


# Writing


def test_interrupted_overwrite_gives_old_or_new(tmp_path, monkeypatch):
    old, new = make(seed=1), make(seed=2, k=4)
    real = os.replace
    for stop in range(4):
        folder = tmp_path / str(stop)
        old.save(folder)
        done = []

        def replace_until(source, target, stop=stop, done=done):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(target)
            real(source, target)

        monkeypatch.setattr(os, "replace", replace_until)
        try:
            new.save(folder)
        except KeyboardInterrupt:
            assert stop < 3
        else:
            assert stop == 3
        monkeypatch.setattr(os, "replace", real)
        expected = old if stop < 2 else new
        loaded = SAE.from_pretrained(folder)
        assert (loaded.weight_hash(), loaded.k) == (expected.weight_hash(), expected.k)
        make(seed=3).save(folder)
        assert SAE.from_pretrained(folder).weight_hash() == make(seed=3).weight_hash()
        assert sorted(path.name for path in folder.iterdir()) == ["sae.json", "sae.safetensors"]


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_disk_that_refuses_leaves_the_old_sae(tmp_path, format):
    target = tmp_path / "layer2.sae.pt" if format == "qwen_scope" else tmp_path / "sae"
    old, new = make(), make(features=4000, seed=5)
    old.save(target, format=format)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match=r"could not be written.*bytes free"):
            new.save(target, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot be made"):
        new.save(
            tmp_path / "file" / "layer2.sae.pt" if format == "qwen_scope" else tmp_path / "file",
            format=format,
        )


def test_litter_of_a_killed_save_is_swept(tmp_path):
    code = (
        "import os, sys, torch\nfrom qscope.checkpoints import _files\nfrom pathlib import Path\n"
        "with _files.temporary(Path(sys.argv[1])) as temp:\n    temp.write_bytes(b'x')\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "sae.safetensors")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    make().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae.json", "sae.safetensors"]


def test_weights_that_must_not_be_saved_or_narrowed(tmp_path):
    sae = make()
    with torch.no_grad():
        sae.W_enc[0, 0] = 1e6
    folder = sae.save(tmp_path / "sae")
    with pytest.raises(CheckpointError, match=r"W_enc has 0 NaN and 1 infinite.*exceed float16"):
        SAE.from_pretrained(folder, dtype=torch.float16)
    assert SAE.from_pretrained(folder, dtype=torch.bfloat16).W_enc[0, 0] == torch.tensor(1e6).bfloat16()
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"W_enc has 1 NaN.*not saved"):
        sae.save(tmp_path / "sae")
    sae.k = F + 1
    with pytest.raises(CheckpointError, match=r"k=11"):
        sae.save(tmp_path / "sae")
