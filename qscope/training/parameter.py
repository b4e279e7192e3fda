"""One parameter of an SAE with all that its optimiser keeps."""

import torch
from torch import Tensor


class Parameter:
    """A parameter as row_adam_ updates it. Rows that no batch touches stand still, and their weights are current at
    every moment: only their moments are decayed late, by the elapsed steps that `last_step` tells. So there is nothing
    to flush before weights are read or saved."""

    def __init__(self, W: Tensor, shadow: bool, ema: bool) -> None:
        self.W = W.contiguous().clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(W), torch.zeros_like(W)
        self.last_step = torch.zeros(len(W), dtype=torch.int32, device=W.device)
        self.shadow = self.W.bfloat16() if shadow else None
        self.ema = self.W.clone() if ema else None

    @property
    def used(self) -> Tensor:
        """What the forward pass reads."""
        return self.W if self.shadow is None else self.shadow

    @property
    def best(self) -> Tensor:
        """What is exported."""
        return self.W if self.ema is None else self.ema

    def tensors(self) -> dict[str, Tensor]:
        """All that the future depends on; the shadow is W rounded."""
        kept = {"W": self.W, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "last_step": self.last_step}
        return kept if self.ema is None else kept | {"ema": self.ema}

    def refresh(self) -> None:
        if self.shadow is not None:
            self.shadow.copy_(self.W)
