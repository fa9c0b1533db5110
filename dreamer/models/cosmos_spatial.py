"""From the positions of a latent image to tokens, and back where that is possible.

Shape letters: B batch, T latent steps, Y X positions, N tokens, C channels of a position, Z channels of a token, K = C * positions of a
token, M samples.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn


def choose_token_grid(positions: tuple[int, int], num_tokens: int) -> tuple[int, int]:
    """Rows and columns of ``num_tokens`` tokens over ``positions``, whole positions each, their blocks as square as possible.

    Raises ``ValueError`` if there is no such grid.
    """
    grids = [
        (rows, num_tokens // rows)
        for rows in range(1, num_tokens + 1)
        if num_tokens % rows == 0 and positions[0] % rows == 0 and positions[1] % (num_tokens // rows) == 0
    ]
    if not grids:
        raise ValueError(
            f"{positions[0]}x{positions[1]} latent positions do not divide into {num_tokens} equal blocks; change num_latent_tokens"
        )
    return min(grids, key=lambda grid: abs(math.log(positions[0] / grid[0] * grid[1] / positions[1])))


def mean_tokens(latents: Float[Tensor, "B C T Y X"], grid: tuple[int, int]) -> Float[Tensor, "B T N C"]:
    """The mean over each block of positions."""
    return reduce(latents, "b c t (r i) (k j) -> b t (r k) c", "mean", r=grid[0], k=grid[1])


def fold(latents: Float[Tensor, "B C T Y X"], grid: tuple[int, int]) -> Float[Tensor, "B T N K"]:
    """The values of each block of positions, side by side. With a block for each position: all positions as tokens."""
    return rearrange(latents, "b c t (r i) (k j) -> b t (r k) (c i j)", r=grid[0], k=grid[1])


def unfold(tokens: Float[Tensor, "B T N K"], grid: tuple[int, int], block: tuple[int, int]) -> Float[Tensor, "B C T Y X"]:
    """The inverse of ``fold``; ``block`` is a token's rows and columns of positions."""
    return rearrange(tokens, "b t (r k) (c i j) -> b c t (r i) (k j)", r=grid[0], k=grid[1], i=block[0], j=block[1])


class BlockPCA(nn.Module):
    """A linear map from K values to Z and back: principal components, each scaled to unit variance. Zeros until ``fit`` was called.

    With Z = K nothing is lost: then it is a rotation and a scaling.
    """

    basis: Tensor
    mean: Tensor
    std: Tensor
    is_fitted: Tensor

    def __init__(self, num_values: int, num_components: int) -> None:
        super().__init__()
        if num_components > num_values:
            raise ValueError(f"latent_dim is {num_components}; the blocks of positions hold only {num_values} values")
        self.register_buffer("basis", torch.zeros(num_values, num_components))
        self.register_buffer("mean", torch.zeros(num_values))
        self.register_buffer("std", torch.ones(num_components))
        self.register_buffer("is_fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, samples: Float[Tensor, "M K"]) -> None:
        """Raises ``ValueError`` for values that are not finite, or for fewer samples than components ask for."""
        num_components = self.basis.shape[1]
        if len(samples) <= num_components:
            raise ValueError(f"the projection to {num_components} channels needs more than {num_components} blocks; got {len(samples)}")
        values = samples.to(self.basis.device, torch.float64)
        if not bool(values.isfinite().all()):
            raise ValueError("the projection cannot be fitted: the latents hold NaN or infinity")
        mean = values.mean(0)
        values = values - mean
        variance, vectors = torch.linalg.eigh(values.T @ values / (len(values) - 1))
        variance, vectors = variance.flip(0)[:num_components], vectors.flip(1)[:, :num_components]
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        self.basis.copy_(vectors * largest.sign())  # an eigenvector's sign is arbitrary: the same on every machine
        self.mean.copy_(mean)
        self.std.copy_(variance.clamp(min=0).sqrt().clamp(min=1e-4))
        self.is_fitted.fill_(True)

    def check_fitted(self) -> None:
        if not bool(self.is_fitted):
            raise ValueError(
                "spatial_mode project: the projection is not fitted yet; call fit_projection(latents) with latents of the data"
            )

    def forward(self, values: Float[Tensor, "B T N K"]) -> Float[Tensor, "B T N Z"]:
        self.check_fitted()
        return (values - self.mean) @ self.basis / self.std

    def inverse(self, tokens: Float[Tensor, "B T N Z"]) -> Float[Tensor, "B T N K"]:
        self.check_fitted()
        return (tokens * self.std) @ self.basis.T + self.mean
