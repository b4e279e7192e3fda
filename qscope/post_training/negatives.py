"""Where the rare negative of a group of rollouts comes from: steering, or a loop made of the response's own tokens."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qscope.errors import InputError
from qscope.sae import SAE
from qscope.steering import SteeringSpec


@dataclass
class SteeredNegative:
    """The last rollout of every group is generated with steering.

    Several specs: each group draws one, so that no single direction is what the model learns from. One for each of
    many features is the control "any feature".
    """

    specs: Sequence[SteeringSpec]
    saes: Mapping[int, SAE] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.specs or not all(spec.edits for spec in self.specs):
            raise InputError("A steered negative was given without a spec, or with an empty one; give one with edits.")
        self._random = random.Random(self.seed)

    def draw(self) -> SteeringSpec:
        return self._random.choice(self.specs) if len(self.specs) > 1 else self.specs[0]


@dataclass
class LoopNegative:
    """The last rollout of every group becomes a loop: its own beginning, then one piece of it until the largest length.

    The control for "is it the feature, or does any repetition do?": no steering, no SAE. The piece is as long as drawn
    between `shortest` and `longest`, and ends where the beginning does, at a place drawn from the response, which lies
    before half of the largest length.
    """

    shortest: int = 2
    longest: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise InputError(f"{self} was given; 1 <= shortest <= longest is accepted.")
        self._random = random.Random(self.seed)

    def loop(self, ids: Sequence[int], largest: int, end_ids: Sequence[int]) -> list[int]:
        """`largest` token ids, none of them an end token; an empty response stays as it is."""
        own = [token for token in ids if token not in end_ids]
        if not own:
            return list(ids)
        own = own[: max(1, largest // 2)]
        period = min(self._random.randint(self.shortest, self.longest), len(own))
        end = self._random.randint(period, len(own))
        made = own[:end]
        while len(made) < largest:
            made.append(made[-period])
        return made[:largest]
