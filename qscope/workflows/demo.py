"""The demo: real text, a pretrained model and the shipped SAE, from nothing to a page of features."""

import time
from dataclasses import dataclass
from pathlib import Path

from qscope import embedded
from qscope.errors import InputError
from qscope.workflows import encode, inspect
from qscope.workflows.inspect_result import InspectResult


@dataclass(frozen=True)
class DemoConfig:
    """Encode real text with the embedded model and SAE, print its features, write an HTML page."""

    out: Path = Path("demo-out")
    """Folder for the text, the feature store and the page."""
    max_tokens: int = 200_000
    """Tokens to encode."""


@dataclass(frozen=True)
class DemoResult:
    encoded: encode.EncodeResult
    inspected: InspectResult
    page: str
    seconds: float


def run(config: DemoConfig) -> DemoResult:
    """Fetch the text and the model (once), encode, inspect. A second call finds the store complete."""
    start = time.perf_counter()
    if config.max_tokens < 1:
        raise InputError(f"--max-tokens is {config.max_tokens}; it must be at least 1.")
    text = embedded.demo_text(config.out / "text.jsonl")
    store, page = config.out / "codes", config.out / "features.html"
    encoded = encode.run(encode.EncodeConfig(text=(str(text),), out=store, max_tokens=config.max_tokens))
    inspected = inspect.run(inspect.InspectConfig(store=store, html=page))
    return DemoResult(encoded, inspected, str(page.resolve()), round(time.perf_counter() - start, 1))
