"""Running the points of a steering evaluation, piece by piece, each kept as it is finished."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qscope.detectors import Detector
from qscope.journal import Journal
from qscope.sae import SAE
from qscope.steering import Steering, steer
from qscope.workflows.steer_eval_arms import UNSTEERED, Point
from qscope.workflows.steer_eval_measures import Question, choose, divergence, generate, halfway, log_probs
from qscope.workflows.steer_eval_result import Raw

NEUTRAL_ROWS = 8
"""Neutral texts per forward pass; the first ones also find the strengths of the baselines."""
QUESTION_ROWS = 32


@dataclass
class Runner:
    """Model, inputs and journal."""

    model: Any
    tokenizer: Any
    saes: Mapping[int, SAE]
    journal: Journal
    prompts: list[str]
    neutral: Tensor
    """[texts, tokens]"""
    questions: list[Question]
    detector: Detector
    batch: int
    max_new_tokens: int
    chat: bool
    progress: Any
    """Counts tokens"""

    @property
    def predicted(self) -> int:
        """Tokens of a neutral text whose predictions count."""
        return self.neutral.shape[1] - halfway(self.neutral.shape[1])

    # --- neutral text ----------------------------------------------------------------------------------------

    def divergences(
        self, points: Sequence[Point], texts: int | None = None
    ) -> dict[str, tuple[list[float], list[float]]]:
        """Key of a point -> cross-entropy and KL, sums per neutral text, of the first `texts` (default: all)."""
        neutral = self.neutral[: texts or len(self.neutral)]
        device = next(self.model.parameters()).device
        for at in range(0, len(neutral), NEUTRAL_ROWS):
            ids = neutral[at : at + NEUTRAL_ROWS].to(device)
            missing = [point for point in points if self.journal.get("neutral", point.key, at) is None]
            if not missing:
                continue
            base = log_probs(self.model, ids)
            for point in missing:
                front = f"{point.instruction}\n" if point.instruction else ""
                prefix = self.tokenizer(front, add_special_tokens=False)["input_ids"] if front else []
                with self.steered(point) as steering:
                    if steering is not None:
                        steering.prompt_length = halfway(ids.shape[1])
                    changed = (
                        base
                        if point.arm == UNSTEERED
                        else log_probs(self.model, ids, prefix, self.tokenizer.bos_token_id)
                    )
                found = divergence(base, changed, ids)
                self.journal.put("neutral", point.key, at, value=[found.cross_entropy, found.kl])
                self.progress.update(ids.numel())
        return {point.key: self._neutral(point, len(neutral)) for point in points}

    def _neutral(self, point: Point, texts: int) -> tuple[list[float], list[float]]:
        pieces = [self.journal.get("neutral", point.key, at) for at in range(0, texts, NEUTRAL_ROWS)]
        return [x for piece in pieces for x in piece[0]], [x for piece in pieces for x in piece[1]]

    # --- everything at one point -----------------------------------------------------------------------------

    def run(self, point: Point) -> Raw:
        """All measures of a point, from the journal where they are there."""
        tokens: list[list[int]] = []
        fired: list[int] = []
        for at in range(0, len(self.prompts), self.batch):
            piece = self.journal.get("generation", point.key, at)
            if piece is None:
                piece = self._generate(point, at)
            tokens += piece["tokens"]
            fired += piece["fired"]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        cross_entropy, kl = self.divergences([point])[point.key]
        return Raw(point, self._scores(point, texts), texts, tokens, fired, cross_entropy, kl, self._right(point))

    def _generate(self, point: Point, at: int) -> Any:
        texts = [self.asked(prompt, point.instruction) for prompt in self.prompts[at : at + self.batch]]
        with self.steered(point) as steering:
            tokens = generate(self.model, self.tokenizer, texts, self.max_new_tokens, special=not self.chat)
            fired = [0] * len(tokens) if steering is None else steering.fired.any(-1).sum(1).tolist()
        self.progress.update(sum(map(len, tokens)))
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return self.journal.put("generation", point.key, at, value={"tokens": tokens, "fired": fired, "texts": texts})

    def asked(self, prompt: str, instruction: str = "") -> str:
        """What the model reads: the instruction, if any, a line break and the prompt; with --chat as a user's turn."""
        text = f"{instruction}\n{prompt}" if instruction else prompt
        if not self.chat:
            return text
        turn = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _scores(self, point: Point, texts: list[str]) -> list[float]:
        """Kept per batch where they are dear: a judge's answers cost money. The texts are part of the key."""
        name = self.detector.kept_as
        if name is None:
            return self.detector(texts, self.prompts)
        scores: list[float] = []
        for at in range(0, len(texts), self.batch):
            taken = texts[at : at + self.batch]
            digest = hashlib.sha256("\0".join(taken).encode("utf-8", "replace")).hexdigest()[:16]
            piece = self.journal.get("scores", name, point.key, at, digest)
            if piece is None:
                value = self.detector(taken, self.prompts[at : at + self.batch])
                piece = self.journal.put("scores", name, point.key, at, digest, value=value)
            scores += piece
        return scores

    def _right(self, point: Point) -> list[bool]:
        if not self.questions:
            return []
        found = self.journal.get("choices", point.key)
        if found is None:
            prefix = f"{point.instruction}\n" if point.instruction else ""
            with self.steered(point) as steering:

                def mark(columns: int) -> None:
                    if steering is not None:
                        steering.prompt_length = columns

                found = choose(self.model, self.tokenizer, self.questions, QUESTION_ROWS, prefix, mark)
            self.journal.put("choices", point.key, value=found)
            self.progress.update(len(self.questions))
        return [bool(right) for right in found]

    @contextlib.contextmanager
    def steered(self, point: Point) -> Iterator[Steering | None]:
        """The model as the point wants it."""
        if point.spec is None:
            yield None
            return
        with steer(self.model, point.spec, saes=self.saes, tokenizer=self.tokenizer) as steering:
            yield steering


def residual_sample(model: Any, neutral: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Residuals [texts, tokens, D] of the first neutral texts."""
    from qscope.model import residuals

    with torch.no_grad():
        return residuals(model, neutral[:NEUTRAL_ROWS], layers)
