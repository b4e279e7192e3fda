"""Mean and scatter of residuals, added up batch by batch in float64, and the best linear code of rank K."""

from typing import NamedTuple

import torch
from torch import Tensor


class Basis(NamedTuple):
    """A linear code: x is described by the coordinates of x - mean along orthonormal directions."""

    mean: Tensor
    """[D] float64"""
    directions: Tensor
    """[K, D] float64, orthonormal rows, largest variance first"""

    def reconstruct(self, x: Tensor) -> Tensor:
        """mean + U^T U (x - mean) for each row of x [N, D]; float64."""
        return self.mean + ((x.double() - self.mean) @ self.directions.T) @ self.directions


class Moments:
    """Count, sum and second moment about `shift` of the rows that were added.

    shift: [D]; a vector near the mean keeps digits. Sets with the same shift can be added: `a + b`. Takes 8 D^2 bytes.
    """

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift.double()
        self.count = 0
        self.total = torch.zeros_like(self.shift)
        self.second = torch.zeros(len(shift), len(shift), dtype=torch.float64, device=shift.device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x: [n, D], finite."""
        rows = x.double() - self.shift
        self.count += len(rows)
        self.total += rows.sum(0)
        self.second.addmm_(rows.T, rows)

    def __add__(self, other: "Moments") -> "Moments":
        if not torch.equal(self.shift, other.shift):
            raise ValueError("Two Moments with different shifts were added; make them with the same one.")
        both = Moments(self.shift)
        both.count = self.count + other.count
        both.total = self.total + other.total
        both.second = self.second + other.second
        return both

    @property
    def mean(self) -> Tensor:
        """[D] float64; the shift if nothing was added."""
        return self.shift + self.total / max(1, self.count)

    def scatter(self) -> Tensor:
        """sum (x - mean)(x - mean)^T, [D, D] float64."""
        return self.second - torch.outer(self.total, self.total) / max(1, self.count)

    def principal(self, k: int) -> Basis:
        """The k directions of largest variance: of all linear codes of rank k the one with the least squared error.

        Fewer where D is smaller than k.
        """
        vectors = torch.linalg.eigh(self.scatter()).eigenvectors
        return Basis(self.mean, vectors.T.flip(0)[:k].contiguous())
