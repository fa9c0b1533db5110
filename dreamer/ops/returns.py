"""Lambda-returns (Dreamer 4, Eq. 10)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def lambda_returns(
    rewards: Float[Tensor, "B R"],
    continues: Float[Tensor, "B R"],
    values: Float[Tensor, "B R1"],
    gamma: float,
    lambda_: float,
) -> Float[Tensor, "B R"]:
    """R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}), with R_H = v_H.

    ``rewards[:, t]`` and ``continues[:, t]`` are r_{t+1} and c_{t+1} (what follows the action at t); ``values`` holds
    v_0 .. v_H, one more column. lambda = 0 gives the one-step target, lambda = 1 the discounted sum ended by v_H.
    """
    if values.shape[1] != rewards.shape[1] + 1:
        raise ValueError(f"values has {values.shape[1]} columns; expected one more than the {rewards.shape[1]} of rewards")
    following = values[:, -1]
    returns = []
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * continues[:, t] * ((1 - lambda_) * values[:, t + 1] + lambda_ * following)
        returns.append(following)
    return torch.stack(returns[::-1], dim=1)
