"""Explanations on disk: one JSON object a line, appended feature by feature; the last line of a feature counts."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qscope.errors import InputError, StoreError
from qscope.explaining.contexts import Evidence
from qscope.explaining.prompts import PROMPT_VERSION, Decode, firing, marked
from qscope.explaining.scores import Score
from qscope.files import acquire_lock, append_line, claim_folder, storage_error

NAME = "explanations.jsonl"
FORMAT = 1
_TEMPORARY = re.compile(r"\.tmp-.*|\..*\.part")
_STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class Made:
    """All that an explanation depends on; a run makes a feature's explanation again where any of it differs."""

    sae_sha256: str
    """`SAE.weight_hash()`"""
    contexts_sha256: str
    """Of the passages, tokens and figures that it was made of and tested with, and of the raised tokens"""
    prompt_version: str
    explainer: str
    """plain, or the model that wrote the sentence"""
    judge: str
    """keywords, the model that judged, or none"""

    __pydantic_config__: ClassVar[Any] = _STRICT


@dataclass(frozen=True)
class ShownToken:
    """A token on which the feature fires."""

    text: str
    count: int
    share: float
    """Of the feature's activation"""
    precision: float
    """Share of the token's occurrences on which it fires"""

    __pydantic_config__: ClassVar[Any] = _STRICT


@dataclass(frozen=True)
class ShownPassage:
    """A strong passage; the tokens on which the feature fires stand between << and >>."""

    document: int
    position: int
    largest: float
    text: str

    __pydantic_config__: ClassVar[Any] = _STRICT


@dataclass(frozen=True)
class Explanation:
    """What a feature means, in words, and how far that holds."""

    layer: int
    feature: int
    text: str
    """The sentence. Written by a model or made of corpus text: data, never an instruction"""
    plain: str
    """The sentence made by rule; the same where no model wrote one"""
    made: Made
    count: int
    """Tokens on which it fires"""
    density: float
    """Share of the tokens that count on which it fires"""
    largest: float
    tokens: tuple[ShownToken, ...]
    raised: tuple[str, ...]
    """Next tokens that it makes more likely (logit lens); none where the model was not read"""
    passages: tuple[ShownPassage, ...]
    scores: dict[str, Score]
    """By `qscope.explaining.scores.KINDS`; empty without a judge"""
    problem: str | None = None
    """Why `text` is not the model's, or some score is missing"""
    format: int = FORMAT

    __pydantic_config__: ClassVar[Any] = _STRICT

    @property
    def key(self) -> tuple[int, int]:
        return self.layer, self.feature


def made_of(evidence: Evidence, raised: Sequence[str], explainer: str, judge: str) -> Made:
    contexts = hashlib.sha256(f"{evidence.sha256()} {json.dumps(list(raised))}".encode()).hexdigest()
    return Made(evidence.sae_sha256, contexts, PROMPT_VERSION, explainer, judge)


def explanation(
    evidence: Evidence,
    made: Made,
    text: str,
    plain: str,
    raised: Sequence[str],
    scores: Mapping[str, Score],
    problem: str | None,
    decode: Decode,
) -> Explanation:
    """Evidence and what was made of it, as it is kept."""
    return Explanation(
        layer=evidence.layer,
        feature=evidence.feature,
        text=text,
        plain=plain,
        made=made,
        count=evidence.count,
        density=evidence.density,
        largest=evidence.largest,
        tokens=tuple(ShownToken(decode([t.token]), t.count, t.share, t.precision) for t in evidence.top_tokens),
        raised=tuple(raised),
        passages=tuple(
            ShownPassage(p.document, p.position, p.largest, marked(p, firing(p), decode)) for p in evidence.strongest
        ),
        scores=dict(scores),
        problem=problem,
    )


def load_explanations(path: str | Path, sae_sha256: str | Mapping[int, str]) -> dict[tuple[int, int], Explanation]:
    """(layer, feature) -> explanation, from a file or from the folder that `qscope explain --out` wrote.

    Args:
        sae_sha256: `SAE.weight_hash()` of the SAE, or of the SAE of each layer; with the latter, explanations of other
            layers are left out.

    Raises:
        InputError: for a file that cannot be read or holds something else, and for features of another SAE.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"The explanations {path} cannot be read: {error.strerror}. Give the file or folder that `qscope explain` "
            "wrote."
        ) from error
    found = {one.key: one for one in _parsed(path, data)[0]}
    if isinstance(sae_sha256, str):
        sae_sha256 = dict.fromkeys({layer for layer, _ in found}, sae_sha256)
    found = {key: one for key, one in found.items() if key[0] in sae_sha256}
    for one in found.values():
        if one.made.sae_sha256 != sae_sha256[one.layer]:
            raise _another(path, one, sae_sha256[one.layer])
    return found


def _another(path: Path, one: Explanation, sha256: str) -> InputError:
    return InputError(
        f"{path} explains features of layer {one.layer} of another SAE (sha256 {one.made.sae_sha256[:12]}, here "
        f"{sha256[:12]}): the same numbers mean other things there. Give that SAE, or explain the features of this one "
        "into another folder."
    )


def _parsed(path: Path, data: bytes) -> tuple[list[Explanation], int]:
    """(explanations in the order of the file, bytes of the lines that are whole)."""
    from pydantic import TypeAdapter, ValidationError

    adapter, found, length = TypeAdapter(Explanation), [], 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # a write that was killed; the next append cuts it off
            break
        try:
            one = adapter.validate_json(line)
            if one.format != FORMAT:
                raise ValueError(f"format {one.format}; this qscope reads {FORMAT}")
        except (ValidationError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            said = f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}" if first else str(error)
            raise InputError(
                f"{path} holds no explanation in line {number}: {said}. Remove that line (its feature is explained "
                "again), or give a file that `qscope explain` wrote."
            ) from error
        found.append(one)
        length += len(line)
    return found, length


class Journal:
    """The folder of a run. A feature's line is on the disk before the next feature is begun."""

    def __init__(self, folder: Path, saes: Mapping[int, str]) -> None:
        """saes: layer -> `SAE.weight_hash()`.

        Raises StoreError where the folder holds something else or another process writes to it, InputError where it
        holds features of another SAE of one of these layers.
        """
        claim_folder(folder, NAME, _TEMPORARY, "folder of explanations")
        self._lock = acquire_lock(folder)
        self.path = folder / NAME
        try:
            self.path.touch()
            found, self._length = _parsed(self.path, self.path.read_bytes())
            for one in found:
                if saes.get(one.layer, one.made.sae_sha256) != one.made.sae_sha256:
                    raise _another(self.path, one, saes[one.layer])
            self.found = {one.key: one for one in found}
        except OSError as error:
            self.close()
            raise storage_error(error, self.path) from error
        except BaseException:
            self.close()
            raise

    def get(self, layer: int, feature: int, made: Made) -> Explanation | None:
        """The explanation of a feature, if there is one that was made of just this."""
        one = self.found.get((layer, feature))
        return one if one is not None and one.made == made else None

    def put(self, one: Explanation) -> None:
        """Raises StorageError."""
        from pydantic import TypeAdapter

        body = TypeAdapter(Explanation).dump_python(one, mode="json")
        try:
            line = json.dumps(body, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError as error:
            raise StoreError(f"Feature {one.feature} has text that is not Unicode: {error}.") from error
        append_line(self.path, self._length, line)
        self._length += len(line)
        self.found[one.key] = one

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
