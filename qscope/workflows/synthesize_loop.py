"""The loop of `qscope synthesize`: what to try next, writing, verification by re-encoding, near-duplicates.

What is tried next depends on the finished batches alone, so a run that goes on after it was killed tries what it would
have tried.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qscope.finding.pooled import Ints
from qscope.synthesis.coverage import Bools
from qscope.synthesis.duplicates import Kept
from qscope.synthesis.journal import BatchJournal
from qscope.synthesis.sources import Request, Source
from qscope.synthesis.targets import Target
from qscope.synthesis.templates import Templates
from qscope.workflows.classify_rules import digits
from qscope.workflows.synthesize_read import Reader

FEATURE, RANDOM = "feature-driven", "random"
Row = dict[str, Any]
"""One attempt, as it stands in the journal"""


@dataclass(frozen=True)
class Settings:
    """How it is tried."""

    budget: int
    support: int
    retries: int
    batch: int
    shots: int
    adversarial: tuple[str, ...]
    responses: bool
    refuse: tuple[str, ...]
    about: str
    seed: int
    text_bar: float
    feature_bar: float


@dataclass
class State:
    """What the finished batches of the feature-driven arm amount to."""

    support: Ints
    """[T] seed texts and kept examples that fire each target"""
    attempts: Ints
    """[T]"""
    failures: Ints
    """[T] attempts since the last kept example"""
    kept: list[Row]
    near: Kept

    def apply(self, rows: Sequence[Row]) -> None:
        for row in rows:
            place = row["target"]
            self.attempts[place] += 1
            self.failures[place] += 1
            if row["verdict"] == "kept":
                self.failures[place] = 0
                self.support[row["fires"]] += 1
                self.kept.append(row)
                self.near.add(row["text"], row["features"])


@dataclass
class Loop:
    """One run."""

    reader: Reader
    sources: Sequence[Source]
    writer: Source | None
    """Who answers, where responses are wanted"""
    templates: Templates
    settings: Settings
    journal: BatchJournal
    known: Sequence[str]
    """Texts that an example may not repeat: those of the seed, and the passages that it was made from"""
    others: Sequence[str]
    """Passages of the pool"""
    other_fires: Bools
    """[len(others), T]"""
    _places: dict[int, list[str]] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.reader.targets

    # --- feature-driven --------------------------------------------------------------------------------------

    def feature_driven(self, seed_support: Ints) -> list[Row]:
        """All attempts, in their order: those of the journal, then new ones until the budget or the targets end."""
        none = np.zeros(len(self.targets), np.int64)
        state = State(seed_support.copy(), none.copy(), none.copy(), [], self._kept())
        batches = self.journal.batches(FEATURE)
        for rows in batches:
            state.apply(rows)
        while plan := self.plan(state):
            rows = self.journal.add(FEATURE, self._feature_batch(plan, state, len(batches)))
            state.apply(rows)
            batches.append(rows)
        return [row for rows in batches for row in rows]

    def plan(self, state: State) -> list[int]:
        """Targets of the next batch: the least covered first, of equals the least tried; none when there is no more.

        A target leaves when `support` texts fire it, or after `retries` attempts in a row without a kept example.
        """
        if len(state.kept) >= self.settings.budget:
            return []
        planned = np.zeros(len(self.targets), np.int64)
        found: list[int] = []
        for _ in range(self.settings.batch):
            open_ = (state.support + planned < self.settings.support) & (
                state.failures + planned < self.settings.retries
            )
            if not open_.any():
                break
            tried = state.attempts + planned
            order = np.lexsort((np.arange(len(planned)), tried, state.support + planned, ~open_))
            found.append(int(order[0]))
            planned[order[0]] += 1
        return found

    def given_up(self, rows: Sequence[Row]) -> set[int]:
        """Targets that left after `retries` failures."""
        failures: dict[int, int] = {}
        for row in rows:
            failures[row["target"]] = 0 if row["verdict"] == "kept" else failures.get(row["target"], 0) + 1
        return {place for place, number in failures.items() if number >= self.settings.retries}

    def _feature_batch(self, plan: Sequence[int], state: State, number: int) -> list[Row]:
        rows, requests = [], []
        planned: dict[int, int] = {}
        for place in plan:
            attempt = int(state.attempts[place]) + planned.get(place, 0)
            planned[place] = planned.get(place, 0) + 1
            row, request = self._request(place, attempt, state)
            rows.append(row)
            requests.append(request)
        self._write(rows, requests, FEATURE, number)
        said = f"{len(state.kept)} of {self.settings.budget} kept, {int(state.attempts.sum())} tried"
        self._judge(rows, state.near, f"verify ({said})", self.settings.budget - len(state.kept))
        self._respond([row for row in rows if row["verdict"] == "kept"], number)
        return rows

    def _request(self, place: int, attempt: int, state: State) -> tuple[Row, Request]:
        target = self.targets[place]
        rng = random.Random(f"{self.settings.seed} {target.name} {attempt}")
        own = [row for row in state.kept if row["target"] == place and row["role"] == "vanilla"]
        # By target too, so that every source meets first attempts and late ones, which are harder.
        source = self.sources[(place + attempt) % len(self.sources)]
        row: Row = {"target": place, "attempt": attempt, "role": "vanilla", "style": None, "from": None}
        examples = tuple(rng.sample(target.contexts, min(self.settings.shots, len(target.contexts))))
        label = target.label or ""
        asking = [s for s in self.sources if s.asks]
        if self.settings.adversarial and asking and own and attempt % 2:
            style = self.settings.adversarial[(attempt // 2) % len(self.settings.adversarial)]
            source = source if source.asks else asking[attempt % len(asking)]
            row |= {"role": "adversarial", "style": style, "from": own[-1]["text"]}
            prompt = self.templates.fill(
                "adversarial", about=self.settings.about, text=own[-1]["text"], style=style, label=label
            )
        else:
            prompt = self.templates.fill(
                "vanilla", about=self.settings.about, meaning=target.meaning or "the examples below",
                examples=examples, label=label,
            )  # fmt: skip
        row |= {"source": source.name, "prompt": _digest(prompt)}
        return row, Request(prompt, examples, self._others(place, rng), target)

    # --- random ----------------------------------------------------------------------------------------------

    def without_features(self, attempts: int) -> list[Row]:
        """As many attempts by the same sources without a feature: about the subject, and like ordinary passages."""
        near = self._kept()
        batches = self.journal.batches(RANDOM)
        for rows in batches:
            for row in rows:
                if row["verdict"] == "kept":
                    near.add(row["text"], row["features"])
        done = sum(map(len, batches))
        while done < attempts:
            rows = []
            requests = []
            for attempt in range(done, min(done + self.settings.batch, attempts)):
                rng = random.Random(f"{self.settings.seed} random {attempt}")
                source = self.sources[attempt % len(self.sources)]
                others = self._others(None, rng)
                prompt = self.templates.fill("random", about=self.settings.about, examples=others)
                rows.append(
                    {"target": -1, "attempt": attempt, "role": "random", "style": None, "from": None,
                     "source": source.name, "prompt": _digest(prompt)}
                )  # fmt: skip
                requests.append(Request(prompt, (), others, None))
            self._write(rows, requests, RANDOM, len(batches))
            self._judge(rows, near, f"random ({done} of {attempts})", attempts)
            for row in rows:
                if row["verdict"] == "kept":
                    near.add(row["text"], row["features"])
            batches.append(self.journal.add(RANDOM, rows))
            done += len(rows)
        return [row for rows in batches for row in rows]

    # --- parts -----------------------------------------------------------------------------------------------

    def _kept(self) -> Kept:
        near = Kept(self.settings.text_bar, self.settings.feature_bar)
        for text in self.known:
            near.add(text)
        return near

    def _others(self, place: int | None, rng: random.Random) -> tuple[str, ...]:
        """Some ordinary passages; for a target, such as do not fire it."""
        key = -1 if place is None else place
        if key not in self._places:
            silent = np.ones(len(self.others), np.bool_) if place is None else ~self.other_fires[:, place]
            self._places[key] = [self.others[i] for i in np.flatnonzero(silent).tolist()]
        found = self._places[key]
        return tuple(rng.sample(found, min(self.settings.shots, len(found))))

    def _write(self, rows: list[Row], requests: list[Request], arm: str, number: int) -> None:
        """Texts of a batch, source by source."""
        for source in self.sources:
            mine = [i for i, row in enumerate(rows) if row["source"] == source.name]
            if mine:
                seed = _seed(self.settings.seed, arm, number, source.name)
                texts = source.write([requests[i] for i in mine], seed)
                for i, text in zip(mine, texts, strict=True):
                    rows[i] |= {"text": text, "seed": seed}

    def _judge(self, rows: list[Row], near: Kept, label: str, room: int) -> None:
        """Verdicts by re-encoding. Texts are compared with those kept in the same batch too."""
        there = [i for i, row in enumerate(rows) if row["text"]]
        readings = self.reader.read([rows[i]["text"] for i in there], label)
        read = {i: at for at, i in enumerate(there)}
        here = Kept(self.settings.text_bar, self.settings.feature_bar)
        for i, row in enumerate(rows):
            row |= {"activation": 0.0, "fires": []}
            if i not in read:
                row["verdict"] = "empty"
                continue
            at = read[i]
            features = readings.features[at]
            row["fires"] = np.flatnonzero(readings.fires[at]).tolist()
            if row["target"] >= 0:
                row["activation"] = digits(readings.values[at, row["target"]])
            if row["target"] >= 0 and row["target"] not in row["fires"]:
                row["verdict"] = "silent"
            elif near.like_text(row["text"]) or here.like_text(row["text"]):
                row["verdict"] = "same text"
            elif near.like_features(features) or here.like_features(features):
                row["verdict"] = "same features"
            elif len(here) >= room:
                row["verdict"] = "over budget"
            else:
                row |= {"verdict": "kept", "features": sorted(features)}
                here.add(row["text"], features)

    def _respond(self, rows: list[Row], number: int) -> None:
        if not self.settings.responses or self.writer is None or not rows:
            return
        requests = []
        for row in rows:
            label = self.targets[row["target"]].label or ""
            row["answer_role"] = "refusal" if label in self.settings.refuse else "answer"
            requests.append(Request(self.templates.fill(row["answer_role"], text=row["text"], label=label)))
        seed = _seed(self.settings.seed, "responses", number, self.writer.name)
        for row, text in zip(rows, self.writer.write(requests, seed), strict=True):
            row["response"] = text


def _seed(seed: int, *parts: object) -> int:
    """Of a batch and a source: below 2^63, as torch wants it."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:8], "little") >> 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
