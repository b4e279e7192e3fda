"""Residual streams of causal language models: where the decoder blocks are, what they put out, loading.

The residual of layer l is the output of decoder block l, taken by a hook there. It is
`hidden_states[l + 1]` of a Hugging Face model except for the last block, whose entry there is after the
final norm.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope import packages
from qscope.errors import InputError, ModelError
from qscope.files import file_sha256

# --- blocks ----------------------------------------------------------------------------------------------

_BLOCK_LISTS = ("layers", "h", "blocks", "block")
_NOT_TEXT = ("vision", "visual", "image", "audio")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of the text trunk, in order, wherever the model keeps them.

    The outermost module list that has as many entries as the (text) config says and lies in no vision or
    audio tower. Raises ModelError, with what was found, unless there is exactly one.
    """
    lists = dict(_outermost_lists(model))
    count = _text_value(model, "num_hidden_layers")
    fitting = {
        name: blocks
        for name, blocks in lists.items()
        if (len(blocks) == count if count is not None else name.rpartition(".")[2] in _BLOCK_LISTS)
        and not any(word in name.lower() for word in _NOT_TEXT)
    }
    if len(fitting) > 1:
        named = {n: blocks for n, blocks in fitting.items() if n.rpartition(".")[2] in _BLOCK_LISTS}
        fitting = named or fitting
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    wanted = "num_hidden_layers is not in its config" if count is None else f"its config says {count} blocks"
    found = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "no module list"
    raise ModelError(
        f"The decoder blocks of {type(model).__name__} could not be told: {wanted}, and it holds {found}. "
        "qscope works with decoder-only models that keep their blocks in one list, such as model.layers of "
        "Qwen, Llama and Gemma."
    )


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Module lists that lie in no other one (experts inside a block are not blocks)."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _text_value(model: nn.Module, name: str) -> int | None:
    """A number of the model's text config (multimodal configs nest it)."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def num_layers(model: nn.Module) -> int:
    """Number of decoder blocks."""
    return len(decoder_layers(model))


def residual_width(model: nn.Module) -> int:
    """D, the width of the residual stream. Raises ModelError where the config does not say."""
    width = _text_value(model, "hidden_size")
    if width is None:
        raise ModelError(
            f"The residual width of {type(model).__name__} could not be told: its config has no hidden_size. "
            "Give a Hugging Face causal language model."
        )
    return width


# --- capture ---------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a forward pass after the deepest captured block; never leaves `capture`."""


@contextlib.contextmanager
def capture(model: nn.Module, layers: Iterable[int], stop: bool = False) -> Iterator[dict[int, Tensor]]:
    """Residuals of `layers` during the forward passes inside the with-block, without gradients.

    Gives a dict that the forward pass fills: layer -> Tensor [B, S, D] in the model's dtype, on its device,
    a copy that later steps of the model cannot change. A second pass replaces what the first one left. The
    hooks are gone when the with-block is left, however it is left, and the dict belongs to the caller.

    With `stop=True` the first forward pass ends right after the deepest of `layers` and leaves the
    with-block: later blocks and the head are not computed, and statements after the model call inside the
    with-block do not run.

    Raises ModelError for a layer that does not exist, for a block that does not put out [B, S, D], and when
    the with-block is left while some layer was never computed (a compiled model may skip hooks silently).
    """
    blocks = decoder_layers(model)
    chosen = _check_layers(layers, len(blocks))
    residual: dict[int, Tensor] = {}
    stopping = _Stop()

    def hook(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            what = f"a tensor {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ModelError(
                f"Block {layer} of {type(model).__name__} puts out {what}; a residual stream [batch, "
                "sequence, width], alone or first in a tuple, is expected. It is not supported."
            )
        residual[layer] = hidden.detach().clone()
        if stop and layer == chosen[-1]:
            raise stopping

    handles = []
    try:
        for layer in chosen:
            handles.append(blocks[layer].register_forward_hook(functools.partial(hook, layer)))
        with torch.no_grad():
            yield residual
    except _Stop as reached:
        if reached is not stopping:  # an outer capture's
            raise
    finally:
        for handle in handles:
            handle.remove()
    missed = [layer for layer in chosen if layer not in residual]
    if missed:
        raise ModelError(
            f"Nothing was captured at layers {missed} of {type(model).__name__}: no forward pass went "
            "through these blocks inside the with-block, or it skipped their hooks, as compiled models and "
            "inference engines do. Call the uncompiled model inside the with-block."
        )


def _check_layers(layers: Iterable[int], count: int) -> list[int]:
    """Distinct layers, ascending; ModelError unless each is a whole number in 0..count-1."""
    given = list(layers)
    wrong = [x for x in given if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < count]
    if wrong or not given:
        raise ModelError(
            f"Layers {given} were given; this model has layers 0 to {count - 1} (blocks counted from 0). "
            "Name at least one of them."
        )
    return sorted(set(given))


def residuals(
    model: nn.Module, input_ids: Tensor, layers: Iterable[int], attention_mask: Tensor | None = None
) -> dict[int, Tensor]:
    """Residuals of one batch: layer -> Tensor [B, S, D]; the model runs no further than the deepest layer.

    Args:
        input_ids: token ids [B, S], integers, padded on the right with any valid id. A causal model's real
            tokens do not see what is to their right, so no mask is needed; residuals at padding mean nothing.
        attention_mask: [B, S], 1 for real tokens; handed to the model.

    Raises InputError for ids that the model has no embedding for and for padding on the left, ModelError as
    `capture` does.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise InputError(
            f"Token ids are a {input_ids.dtype} tensor {list(input_ids.shape)}; integers [batch, sequence] "
            "with at least one token are expected."
        )
    if attention_mask is not None and bool((attention_mask.long().diff(dim=1) > 0).any()):
        raise InputError("The attention mask has padding left of a token; pad on the right (padding_side='right').")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    low, high = (int(x) for x in torch.aminmax(input_ids))
    # Checked here because an id out of range on a GPU ends the whole CUDA context.
    if low < 0 or high >= embedding.num_embeddings:
        raise InputError(
            f"Token ids run from {low} to {high}, and the model knows 0 to {embedding.num_embeddings - 1}. "
            "Use the tokenizer that belongs to this model."
        )
    ids = input_ids.to(embedding.weight.device)
    mask = None if attention_mask is None else attention_mask.to(ids.device)
    with capture(model, layers, stop=True) as residual:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return residual


# --- loading ---------------------------------------------------------------------------------------------


def load_model(
    name_or_path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder or Hub name, in eval mode, without key-value cache.

    Safetensors weights only, and no code that comes with the model is run. `dtype` is "auto" (bfloat16 where
    the device computes in it, else float32), "bfloat16", "float16" or "float32"; `device` "auto" is CUDA
    where there is one. Raises ModelError when the model is absent, incomplete or at odds with its tokenizer.
    """
    import safetensors
    import transformers

    place = _device(device)
    kind = _dtype(dtype, place)
    name = str(name_or_path)
    local = _check_name(name)
    if local:
        name = str(Path(name).expanduser())
    options = {"trust_remote_code": False, "local_files_only": local or not packages.hub_reachable()}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=kind, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, safetensors.SafetensorError) as error:
        raise _load_error(name, local, bool(options["local_files_only"]), error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"The weights of {name} are not whole: {len(missing)} tensors are missing, {missing[0]} first, "
            "and would be random numbers. Fetch or save the model again."
        )
    check_tokenizer(model, tokenizer)
    model.config.get_text_config().use_cache = False
    try:
        return model.eval().to(place), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"The model {name} could not be put on {place}: {_first_line(error)}.") from error


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """ModelError if the tokenizer can produce an id that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"The tokenizer has ids up to {highest}, and the model knows only 0 to {rows - 1}. Use the "
            "tokenizer that belongs to this model."
        )


def _device(given: str | torch.device) -> torch.device:
    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ModelError(f"Device {given!r} was given; cpu, cuda, cuda:1 or auto are accepted.") from error
    if device.type == "meta":
        raise ModelError("Device 'meta' was given, which holds no numbers; cpu, cuda, cuda:1 or auto are accepted.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"Device {device} was given, and torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices here. Give cpu or auto, or install a CUDA build of torch."
        )
    return device


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _dtype(given: str | torch.dtype, device: torch.device) -> torch.dtype:
    if given == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    found = given if isinstance(given, torch.dtype) else _DTYPES.get(given)
    if found is None or found not in _DTYPES.values():
        raise ModelError(f"dtype {given} was given; auto, {', '.join(_DTYPES)} are accepted.")
    return found


def _computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: float32 is right everywhere
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text) is not None


def _check_name(name: str) -> bool:
    """Whether `name` is a local folder; ModelError if it can be neither a model folder nor a Hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {name} holds no config.json, so it is no Hugging Face model folder.")
        if not any(path.glob("*.safetensors")):
            raise ModelError(
                f"The model folder {name} holds no *.safetensors file, and qscope reads no pickled weights "
                "(.bin, .pt): save the model again with save_pretrained."
            )
        return True
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ModelError(
            f"The model {name} was given; a folder that save_pretrained wrote or a Hub name such as "
            "Qwen/Qwen3-1.7B-Base is accepted, and there is no such folder."
        )
    return False


def _load_error(name: str, local: bool, offline: bool, error: BaseException) -> ModelError:
    if local:
        advice = "The folder is damaged, incomplete or of a kind this transformers cannot load; save it again."
    elif offline:
        advice = (
            "The Hugging Face Hub cannot be reached from here (or HF_HUB_OFFLINE is set), and the local "
            "cache does not hold the whole model. Fetch it where there is a network, or give a model folder."
        )
    else:
        advice = "Check the name; a gated model also needs `hf auth login`."
    return ModelError(f"The model {name} could not be loaded: {_first_line(error)}. {advice}")


def _first_line(error: BaseException) -> str:
    """First line of an error's text: what transformers prints after it is advice for other programs."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# --- identity --------------------------------------------------------------------------------------------


def model_hash(model: str | Path | nn.Module) -> str:
    """sha256 (hex) that identifies a model: its config and weights.

    For a folder or Hub name: of the config (without the transformers version that wrote it) and of the weight
    files, so it does not depend on the dtype the model is loaded in. A Hub name means the snapshot in the
    local cache. For a module: of the parameters and buffers in memory, which gives another hash.
    """
    if isinstance(model, nn.Module):
        return _module_hash(model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _snapshot(str(model))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [json.dumps(_plain_config(config), sort_keys=True)]
        lines += [f"{path.name} {_file_hash(path)}" for path in _weight_files(folder)]
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The model folder {folder} could not be read: {error}. It must hold config.json and its weights."
        ) from error
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _snapshot(name: str) -> Path:
    """Folder of a Hub model in the local cache."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The model {name} is neither a folder nor in the local Hub cache. Load it or name a folder."
        ) from error
    return Path(found).parent


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in config.items() if key != "transformers_version" and not key.startswith("_")}


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, by name; an index names those of a sharded model."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise FileNotFoundError(f"no model.safetensors or {index.name}")


def _file_hash(path: Path) -> str:
    """sha256 of a file; the Hub's cache keeps a large file under that name, so it need not be read again."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    return file_sha256(path)


def _module_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        digest.update(json.dumps(_plain_config(config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 (hex) of what a tokenizer does to text: vocabulary, merges, normaliser, special tokens.

    Padding and truncation, which calls may switch on and off, do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None
    content["special"] = {key: str(x) for key, x in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
