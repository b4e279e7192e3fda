"""Which features rise as a text repeats itself, and whether they cause it.

Qwen-Scope section 8: in a sample that repeats, every token id t of the response that occurs at least twice has

    rise_f(t) = a_f(last occurrence of t) - a_f(first occurrence of t)        a_f: activation after TopK, 0 outside it

The paper does not say how rises are put together. Here: mean over the ids of a sample, then over samples, so that a
long sample counts as one; the same in control texts, which repeat ids in the ordinary way; and features are ranked by
Welch's t of the samples' means against the controls', among those that rise more in the samples.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qscope.errors import InputError
from qscope.model import residuals
from qscope.post_training.repetition import occurrences
from qscope.post_training.rollouts import Rollout
from qscope.sae import SAE
from qscope.steering import Edit, SteeringSpec

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerRises:
    """Of one layer. Arrays are [F] float64."""

    looping: Floats
    """Mean rise in the samples that repeat."""
    control: Floats
    """Mean rise in the control texts."""
    t: Floats
    """Welch's t of looping against control; 0 where the feature never changes."""
    samples: tuple[int, int]
    """How many samples, how many controls."""
    residual_norm: float
    """Median norm of the residual at the places that were read: the unit of steering strengths."""

    def ranked(self, count: int) -> list[int]:
        """The features with the largest t among those with a mean rise above 0 and above that of the controls."""
        fitting = (self.looping > 0) & (self.looping > self.control)
        order = np.lexsort((np.arange(len(self.t)), -np.where(fitting, self.t, -np.inf)))
        return [int(f) for f in order[:count] if fitting[f]]


@dataclass
class _Sums:
    total: Floats
    squares: Floats
    count: int = 0

    def add(self, mean: Floats) -> None:
        self.total += mean
        self.squares += mean * mean
        self.count += 1

    def moments(self) -> tuple[Floats, Floats]:
        """(mean, squared standard error)."""
        mean = self.total / self.count
        spread = np.maximum(self.squares - self.count * mean * mean, 0) / max(self.count - 1, 1)
        return mean, spread / self.count


def rises(
    model: Any, saes: Mapping[int, SAE], looping: Iterable[Rollout], control: Iterable[Rollout]
) -> dict[int, LayerRises]:
    """layer -> the rises of all its features. Samples without an id that occurs twice are left out.

    Holds a few [F] arrays per layer, and the activations of the first and last occurrences of one sample.
    Raises InputError where fewer than two samples or two controls are left: a mean of one has no spread.
    """
    sides = {}
    norms: dict[int, list[float]] = {layer: [] for layer in saes}
    for name, samples in (("looping", looping), ("control", control)):
        sums = {layer: _Sums(np.zeros(sae.d_sae), np.zeros(sae.d_sae)) for layer, sae in saes.items()}
        for sample in samples:
            for layer, (mean, norm) in _rise(model, saes, sample).items():
                sums[layer].add(mean)
                norms[layer] += norm
        if min(s.count for s in sums.values()) < 2:
            raise InputError(
                f"Only {min(s.count for s in sums.values())} {name} samples have a token that occurs twice; at least "
                "2 are needed to tell a rise from chance. Sample more responses, longer ones, or at a lower "
                "temperature, or name the features."
            )
        sides[name] = sums
    found = {}
    for layer in saes:
        (mean, error), (base, base_error) = (sides[name][layer].moments() for name in ("looping", "control"))
        spread = np.sqrt(error + base_error)
        t = np.divide(mean - base, spread, out=np.zeros_like(mean), where=spread > 0)
        counts = (sides["looping"][layer].count, sides["control"][layer].count)
        found[layer] = LayerRises(mean, base, t, counts, float(np.median(norms[layer])))
    return found


def _rise(model: Any, saes: Mapping[int, SAE], sample: Rollout) -> dict[int, tuple[Floats, list[float]]]:
    """layer -> (mean rise [F] of one sample, norms of the residuals read); empty where no id occurs twice."""
    pairs = occurrences(sample.response)
    if not pairs:
        return {}
    start = len(sample.prompt)
    places = torch.tensor([[first, last] for _, first, last in pairs]) + start
    ids = torch.tensor([[*sample.prompt, *sample.response]])
    hidden = residuals(model, ids, saes)
    found = {}
    for layer, sae in saes.items():
        x = hidden[layer][0][places.flatten().to(hidden[layer].device)].to(sae.device)
        with torch.no_grad():
            acts, indices = sae.encode_topk(x)
        signed = acts.double().cpu().numpy().reshape(len(pairs), 2, -1) * np.array([-1.0, 1.0])[None, :, None]
        mean = np.zeros(sae.d_sae)
        np.add.at(mean, indices.cpu().numpy().ravel(), signed.ravel() / len(pairs))
        found[layer] = (mean, x.float().norm(dim=-1).tolist())
    return found


# --- cause -----------------------------------------------------------------------------------------------


def steering_spec(features: Mapping[int, Sequence[int]], strength: float, norms: Mapping[int, float]) -> SteeringSpec:
    """h + strength |h| d/|d| at every generated token (eq. 28), shared evenly by the features.

    norms: layer -> typical norm of the residual, |h|. The features of one SAE may be far from orthogonal, and their
    sum longer or shorter than `strength`.
    """
    count = sum(len(ids) for ids in features.values())
    edits = tuple(
        Edit(layer=layer, feature=feature, strength=strength / count, unit="residual", scale=norms[layer],
             tokens="generated")
        for layer, ids in sorted(features.items())
        for feature in ids
    )  # fmt: skip
    return SteeringSpec(edits)


@dataclass(frozen=True)
class Cause:
    """Share of endless responses at one strength, on the prompts it was tried on."""

    strength: float
    hits: int
    count: int

    @property
    def ratio(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, Wilson 1927."""
        return wilson(self.hits, self.count)


def causal_check(
    count_endless: Callable[[Sequence[Any], SteeringSpec | None], int],
    make: Callable[[float], SteeringSpec],
    calm: Sequence[Any],
    prone: Sequence[Any],
    strengths: Sequence[float],
) -> dict[str, list[Cause]]:
    """Does adding the features make calm prompts repeat, and taking them away stop prone ones (Fig. 20)?

    Args:
        count_endless: how many of the prompts get an endless response under a spec (None: unsteered).
        make: strength -> spec, as `steering_spec` with features and norms filled in.
        calm, prone: prompts whose response did not, and did, repeat. Either may be empty, then its side is too.
        strengths: above 0; `prone` gets them negated.

    Returns "amplify" and "suppress", each unsteered first (strength 0), then by strength.
    """
    found = {}
    for name, prompts, sign in (("amplify", calm, 1.0), ("suppress", prone, -1.0)):
        levels = [0.0, *(sign * s for s in strengths)] if prompts else []
        found[name] = [Cause(s, count_endless(prompts, make(s) if s else None), len(prompts)) for s in levels]
    return found


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share (Wilson 1927); (0, 1) for no cases."""
    if not count:
        return 0.0, 1.0
    share, slack = hits / count, z * z / count
    middle = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * math.sqrt(share * (1 - share) / count + slack / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
