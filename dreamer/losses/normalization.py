"""Loss terms on one scale: each is divided by a running estimate of its own root mean square (Dreamer 4, Section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LossNormalizer(nn.Module):
    """Divides each named loss by sqrt(E[loss^2]), an exponential mean with bias correction. The state is saved with the run."""

    mean_square: Tensor
    count: Tensor

    def __init__(self, names: tuple[str, ...], decay: float = 0.99) -> None:
        super().__init__()
        self.names, self.decay = names, decay
        self.register_buffer("mean_square", torch.zeros(len(names)))
        self.register_buffer("count", torch.zeros(len(names)))

    def forward(self, name: str, loss: Tensor, has_rows: bool = True) -> Tensor:
        """loss / rms. In training mode the estimate first takes in this value; a non-finite one is left out.

        ``has_rows`` is False where nothing in the batch counts for this loss: its 0 is no measurement, and is left out too.
        """
        i = self.names.index(name)
        if self.training and has_rows and torch.isfinite(loss):
            self.mean_square[i] = self.decay * self.mean_square[i] + (1 - self.decay) * loss.detach().float().square()
            self.count[i] += 1
        if self.count[i] == 0:
            return loss
        rms = (self.mean_square[i] / (1 - self.decay ** self.count[i])).sqrt()
        return loss / rms.clamp(min=1e-8)
