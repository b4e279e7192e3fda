"""Where a training run's activations come from: a model that reads text, or a folder of stored activations."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qscope import embedded
from qscope._version import __version__
from qscope.activation_store import ActivationStore
from qscope.checkpoints._weights import as_device
from qscope.data import TextOptions
from qscope.distributed import Group
from qscope.errors import InputError
from qscope.training.activations import MODEL_TOKENS, DatasetText, ModelActivations, TextFiles, model_stream
from qscope.training.buffer import Point, ShuffledStream
from qscope.training.stored_activations import BLOCK, BLOCKS_AT_ONCE, stored_stream
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import load_encoder
from qscope.workflows.train import TrainConfig


@dataclass
class Supply:
    """A stream of activations and what is to be known about it."""

    stream: ShuffledStream
    inputs: tuple[Point, ...]
    """Points that are encoded"""
    targets: tuple[Point | None, ...]
    """What each of them predicts, None: itself"""
    device: torch.device
    device_name: str
    model_name: str
    model_sha256: str
    context_size: int
    dtype: str
    source: str
    """What was read, for people"""

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self.stream.producer.widths)

    def width(self, point: Point) -> int:
        return self.stream.producer.widths[point]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the activations depend on, as JSON. Kept: hashing a tokenizer takes a second."""
        return {"model_sha256": self.model_sha256, **self.stream.settings()}

    def settings_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def about(self) -> dict[str, str]:
        settings = self.settings
        return {
            "text": self.source,
            "context": f"{self.context_size} tokens, first token {settings['first_token']}",
            "norm filter": "none" if settings["norm_multiple"] is None else f"{settings['norm_multiple']:g} x median",
            "buffer": f"{settings['buffer_tokens']:,} tokens",
            "activations": self.dtype,
            "device": self.device_name,
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }


def versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"qscope": __version__, **found}


def open_supply(config: TrainConfig, manifest: Mapping[str, Any], group: Group | None = None) -> Supply:
    """The stream that `config` names; nothing is computed yet but one token for the widths.

    manifest: of a run that goes on, otherwise empty. Of a group every process gets all activations, and the same:
    text, filter and shuffle buffer are alike, so that the stream's state is one for any number of processes; the
    model's work alone is divided.
    """
    if config.activations is not None:
        return _stored(config)
    if group is not None and not group.first:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # while the model is loaded: one process shows it
    begun = manifest.get("config", {}).get("activations", {})
    return _from_model(config, begun.get("windows"), group)


def _stored(config: TrainConfig) -> Supply:
    assert config.activations is not None
    device = as_device(chosen_device(config.device))
    store = ActivationStore(config.activations)
    layers = config.layers or store.layers
    stream = stored_stream(
        store, layers, buffer_tokens=config.buffer(BLOCK * BLOCKS_AT_ONCE), tokens=_budget(config),
        seed=config.data_seed, device=device, first_token=config.first_token, norm_multiple=config.norm_multiple,
        cycle=config.cycle,
    )  # fmt: skip
    model = store.settings["model"]
    return Supply(
        stream=stream,
        inputs=tuple(layers),
        targets=(None,) * len(layers),
        device=device,
        device_name=_device_name(device),
        model_name=model["name"],
        model_sha256=model["sha256"],
        context_size=store.settings["context_size"],
        dtype=str(stream.producer.dtype).removeprefix("torch."),
        source=f"stored activations {config.activations.name}",
    )


def _from_model(config: TrainConfig, begun_windows: int | None, group: Group | None) -> Supply:
    """begun_windows: how many windows at once the run began with, on what may have been another number of processes."""
    text = _text(config)
    inputs = tuple(map(_point, config.transcoder_in)) or config.layers or (embedded.DEFAULT_LAYER,)
    targets = tuple(map(_point, config.transcoder_out)) or (None,) * len(inputs)
    points = list(dict.fromkeys(point for point in (*inputs, *targets) if point is not None))
    blocks = tuple(sorted({_block(point) for point in points}))
    loaded = load_encoder(
        EncodeConfig(
            text=config.text, features=False, activations=config.out, layers=blocks, model=config.model,
            context_size=config.context_size, dtype=config.dtype, device=chosen_device(config.device),
        )
    )  # fmt: skip
    fits = MODEL_TOKENS[loaded.model.device.type == "cuda"]
    model_tokens = config.model_tokens or (begun_windows or 0) * config.context_size or fits * config.processes
    at_once = max(1, model_tokens // config.context_size) * config.context_size
    stream = model_stream(
        loaded.model, loaded.tokenizer, text, points, buffer_tokens=config.buffer(at_once), tokens=_budget(config),
        seed=config.data_seed, context_size=config.context_size, model_tokens=model_tokens, separator=config.separator,
        bos=config.bos, first_token=config.first_token, norm_multiple=config.norm_multiple, cycle=config.cycle,
    )  # fmt: skip
    producer = stream.producer
    assert isinstance(producer, ModelActivations)
    if config.model_tokens is None:
        producer.windows_at_once = max(1, fits // config.context_size)
    if group is not None:
        producer.axis = group.world
    return Supply(
        stream=stream,
        inputs=inputs,
        targets=targets,
        device=loaded.model.device,
        device_name=loaded.device,
        model_name=loaded.model_name,
        model_sha256=loaded.model_sha256,
        context_size=config.context_size,
        dtype=loaded.dtype,
        source=text.name if isinstance(text, DatasetText) else ", ".join(Path(name).name for name in config.text),
    )


def _text(config: TrainConfig) -> TextFiles | DatasetText:
    field = config.field or ("messages" if config.chat else "text")
    if config.dataset is not None:
        return DatasetText.load(
            config.dataset, config.dataset_split, config.dataset_config, field=field, chat=config.chat,
            strict=config.strict,
        )  # fmt: skip
    return TextFiles(config.text, TextOptions(config.format, field, config.strict), config.chat)


def _budget(config: TrainConfig) -> int:
    """Tokens that will be asked for."""
    return config.total_steps * config.batch_tokens


def _point(name: str) -> Point:
    return int(name) if name.isdecimal() else name


def _block(point: Point) -> int:
    tail = str(point).rpartition(".")[2]
    if not tail.isdecimal() or (isinstance(point, str) and point not in (f"mlp_in.{tail}", f"mlp_out.{tail}")):
        raise InputError(
            f"Activations at {point!r} were asked for. Accepted: the number of a block, from 0 (its output), and for "
            "transcoders also mlp_in.N or mlp_out.N of block N."
        )
    return int(tail)


def chosen_device(name: str) -> str:
    """`name`, or what there is for "auto"."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
