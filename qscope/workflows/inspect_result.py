"""What `qscope.workflows.inspect` returns: features, contexts and texts as plain data."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Order = Literal["frequent", "strongest", "specific"]

ORDERS: dict[str, str] = {
    "frequent": "number of tokens on which the feature is active",
    "strongest": "largest activation",
    "specific": "sum of activations / (active tokens + 8) x ln(tokens / active tokens)",
}

TEXT_ORDERS: dict[str, str] = {
    "frequent": "number of tokens of the text on which the feature is active",
    "strongest": "sum of activations in the text",
    "specific": "sum of activations in the text x ln(density in the text / density in the store), at least 0",
}


@dataclass(frozen=True)
class TokenShare:
    """How much of a feature's activation falls on one token of the vocabulary."""

    token: int
    text: str
    count: int
    share: float
    """Of the sum of the feature's activations, 0 to 1."""


@dataclass(frozen=True)
class Context:
    """A passage around a strong activation."""

    document: int
    position: int
    """Of the peak, in tokens from the start of the document."""
    peak: int
    """Index of the peak in `tokens`."""
    tokens: list[str]
    activations: list[float]


@dataclass(frozen=True)
class Meaning:
    """What `qscope explain` says of a feature."""

    text: str
    by: str
    """plain, or the model that wrote it"""
    detection: float | None
    """Balanced accuracy on passages set aside; 0.5 is chance. None where it was not scored"""
    fuzzing: float | None


@dataclass(frozen=True)
class Feature:
    """One feature over the whole store."""

    id: int
    count: int
    """Tokens on which it is active."""
    density: float
    """`count` over all counted tokens."""
    mean: float
    """Mean activation where active."""
    max: float
    score: float
    """By which the chosen order sorts, see `ORDERS`."""
    histogram: list[int]
    """Active tokens in 16 equal steps of activation from 0 to `max`."""
    top_tokens: list[TokenShare]
    contexts: list[Context]
    meaning: Meaning | None = None


@dataclass(frozen=True)
class TextToken:
    """A token of a text with its leading features (feature id, activation), best first."""

    text: str
    features: list[tuple[int, float]]
    left_out: bool


@dataclass(frozen=True)
class TextFeature:
    """A feature within one text."""

    id: int
    tokens: int
    """Tokens of the text on which it is active."""
    total: float
    """Sum of its activations in the text."""
    max: float
    peak: int
    """Index of the token with the largest activation."""
    density: float
    """In the whole store."""
    activations: list[tuple[int, float]]
    """Index of a shown token and the activation there."""


@dataclass(frozen=True)
class Text:
    """A stored text, as far as it is shown."""

    document: int
    num_tokens: int
    tokens: list[TextToken]
    features: list[TextFeature]


@dataclass(frozen=True)
class InspectResult:
    """All that the terminal and the page show."""

    about: dict[str, str]
    """Where the numbers come from: model, SAE, precision."""
    layer: int
    layers: list[int]
    num_tokens: int
    """Tokens in the store."""
    counted_tokens: int
    """Tokens the statistics are made of."""
    nan_tokens: int
    sink_tokens: int
    """Tokens of extreme norm; left out unless `sinks_counted`."""
    sinks_counted: bool
    num_documents: int
    d_sae: int
    k: int
    l0: float
    """Mean number of active features per counted token."""
    alive: int
    """Features active at least once."""
    density_histogram: list[int]
    """Alive features by density: [10^-7, 10^-6.5), ... to [10^-0.5, 1]; rarer ones are in the first bin."""
    order: Order
    document: int | None
    """The text whose strongest features were asked for; it is `texts[0]` then, and `features` are its own."""
    html: Path | None
    """Where the page was asked for; `qscope.report.inspect_page.finish` writes it."""
    features: list[Feature]
    texts: list[Text]
    text_features: list[Feature]
    """Leading features of `texts` that are not among `features`; only with a page, which links to them."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, for `json.dumps`."""
        return asdict(self) | {"html": None if self.html is None else str(self.html)}
