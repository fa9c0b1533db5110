"""Heads on the agent token's output: policy, reward, continue and value (Dreamer 4, Section 3.3).

Shape letters: D width, M multi-token-prediction distances, P actions per latent step, A action columns, Q two-hot bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dreamer.models.transformer import RMSNorm
from dreamer.ops.shares import own_rows, whole_size
from dreamer.ops.twohot import twohot_decode
from dreamer.types import ActionSpace, Config


class HeadConfig(Config):
    hidden: int = Field(default=256, ge=1)
    num_layers: int = Field(default=1, ge=0)  # hidden layers
    num_distances: int = Field(default=8, ge=1)  # M: multi-token prediction of policy, reward and continue, n = 0 .. M - 1
    num_bins: int = Field(default=255, ge=3)  # of the symexp two-hot code
    bin_range: float = Field(default=20.0, gt=0)  # bins reach from -bin_range to bin_range in symlog units
    min_std: float = Field(default=0.1, gt=0)  # of continuous actions


@dataclass(frozen=True)
class ActionDistribution:
    """Independent distributions of an action's components, over ``parameters (..., K)`` laid out component by component.

    Categorical: ``size`` logits. Binary: ``size`` logits. Continuous: ``size`` means and ``size`` raw deviations of a normal
    distribution over the action scaled to [-1, 1]; samples are clamped to the action's range.
    """

    space: ActionSpace
    parameters: Float[Tensor, "... K"]
    min_std: float = 0.1

    @staticmethod
    def num_parameters(space: ActionSpace) -> int:
        return sum(2 * c.size if c.kind == "continuous" else c.size for c in space.components)

    def _parts(self):
        start = 0
        for component, columns in self.space.slices():
            size = 2 * component.size if component.kind == "continuous" else component.size
            yield component, columns, self.parameters[..., start : start + size].float()
            start += size

    def _normal(self, parameters: Tensor) -> torch.distributions.Normal:
        mean, raw = parameters.chunk(2, dim=-1)
        return torch.distributions.Normal(mean, F.softplus(raw) + self.min_std, validate_args=False)

    def log_prob(self, actions: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
        """ln pi(a), summed over components. Of a continuous part: the density of the action scaled to [-1, 1]."""
        total = torch.zeros((), device=self.parameters.device)
        for component, columns, parameters in self._parts():
            values = actions[..., columns]
            if component.kind == "categorical":
                total = total + parameters.log_softmax(-1).gather(-1, values.long()).squeeze(-1)
            elif component.kind == "binary":
                total = total - F.binary_cross_entropy_with_logits(parameters, values.float(), reduction="none").sum(-1)
            else:
                scaled = 2 * (values - component.low) / (component.high - component.low) - 1
                total = total + self._normal(parameters).log_prob(scaled).sum(-1)
        return total

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "... A"]:
        """One action from each distribution."""
        columns_out = []
        for component, _, parameters in self._parts():
            shape = (whole_size(len(parameters)), *parameters.shape[1:])
            if component.kind == "categorical":
                uniform = own_rows(torch.rand(shape, generator=generator, device=parameters.device))
                gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
                columns_out.append((parameters + gumbel).argmax(-1, keepdim=True).float())
            elif component.kind == "binary":
                uniform = own_rows(torch.rand(shape, generator=generator, device=parameters.device))
                columns_out.append((uniform < parameters.sigmoid()).float())
            else:
                normal = self._normal(parameters)
                noise = own_rows(torch.randn((*shape[:-1], normal.mean.shape[-1]), generator=generator, device=parameters.device))
                columns_out.append(self._unscale(component, normal.mean + normal.stddev * noise))
        return torch.cat(columns_out, dim=-1)

    def mode(self) -> Float[Tensor, "... A"]:
        """The most likely action: argmax, threshold at one half, mean."""
        columns_out = []
        for component, _, parameters in self._parts():
            if component.kind == "categorical":
                columns_out.append(parameters.argmax(-1, keepdim=True).float())
            elif component.kind == "binary":
                columns_out.append((parameters > 0).float())
            else:
                columns_out.append(self._unscale(component, self._normal(parameters).mean))
        return torch.cat(columns_out, dim=-1)

    @staticmethod
    def _unscale(component, scaled: Tensor) -> Tensor:
        values = (scaled.clamp(-1, 1) + 1) / 2 * (component.high - component.low) + component.low
        return values.clamp(component.low, component.high)  # rounding may end one step outside

    def kl(self, other: ActionDistribution) -> Float[Tensor, "..."]:
        """KL[self || other] in nats, summed over components."""
        total = torch.zeros((), device=self.parameters.device)
        for (component, _, mine), (_, _, theirs) in zip(self._parts(), other._parts(), strict=True):
            if component.kind == "categorical":
                log_p, log_q = mine.log_softmax(-1), theirs.log_softmax(-1)
                total = total + (log_p.exp() * (log_p - log_q)).sum(-1)
            elif component.kind == "binary":
                p = mine.sigmoid()
                on, off = F.logsigmoid(mine) - F.logsigmoid(theirs), F.logsigmoid(-mine) - F.logsigmoid(-theirs)
                total = total + (p * on + (1 - p) * off).sum(-1)
            else:
                total = total + torch.distributions.kl_divergence(self._normal(mine), self._normal(theirs)).sum(-1)
        return total

    def entropy(self) -> Float[Tensor, "..."]:
        """In nats; a continuous part counts as its differential entropy."""
        total = torch.zeros((), device=self.parameters.device)
        for component, _, parameters in self._parts():
            if component.kind == "categorical":
                log_p = parameters.log_softmax(-1)
                total = total - (log_p.exp() * log_p).sum(-1)
            elif component.kind == "binary":
                p = parameters.sigmoid()
                total = total - (p * F.logsigmoid(parameters) + (1 - p) * F.logsigmoid(-parameters)).sum(-1)
            else:
                total = total + self._normal(parameters).entropy().sum(-1)
        return total


class MLP(nn.Module):
    """RMSNorm, then ``num_layers`` hidden layers, then one linear output; the output starts at (nearly) zero."""

    def __init__(self, width: int, out: int, config: HeadConfig, out_scale: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [RMSNorm(width)]
        for _ in range(config.num_layers):
            layers += [nn.Linear(width, config.hidden), nn.SiLU()]
            width = config.hidden
        self.trunk = nn.Sequential(*layers)
        self.out = nn.Linear(width, out)
        nn.init.normal_(self.out.weight, std=out_scale * width**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self.trunk(features))


class PolicyHead(nn.Module):
    """pi(a_{t+n} | h_t): one output layer for each distance n = 0 .. M - 1 and each of the P actions of a step."""

    def __init__(self, space: ActionSpace, width: int, config: HeadConfig, actions_per_step: int = 1) -> None:
        super().__init__()
        self.space, self.config, self.actions_per_step = space, config, actions_per_step
        self.num_parameters = ActionDistribution.num_parameters(space)
        self.mlp = MLP(width, config.num_distances * actions_per_step * self.num_parameters, config, out_scale=0.01)

    def forward(self, features: Float[Tensor, "*S D"]) -> ActionDistribution:
        """Distributions over (..., M, P)."""
        raw = self.mlp(features)
        parameters = rearrange(raw, "... (m p k) -> ... m p k", p=self.actions_per_step, k=self.num_parameters)
        return ActionDistribution(self.space, parameters, self.config.min_std)

    def now(self, features: Float[Tensor, "*S D"]) -> ActionDistribution:
        """Distributions over (..., P): the actions of this step (distance 0)."""
        distribution = self(features)
        return ActionDistribution(self.space, distribution.parameters[..., 0, :, :], self.config.min_std)


class ScalarHead(nn.Module):
    """A scalar as symexp two-hot logits, for ``num_distances`` distances: the reward (M) and the value (1)."""

    def __init__(self, width: int, config: HeadConfig, num_distances: int) -> None:
        super().__init__()
        self.bin_range, self.num_distances = config.bin_range, num_distances
        self.mlp = MLP(width, num_distances * config.num_bins, config, out_scale=0.0)

    def forward(self, features: Float[Tensor, "*S D"]) -> Float[Tensor, "*S M Q"]:
        return rearrange(self.mlp(features), "... (m q) -> ... m q", m=self.num_distances)

    def mean(self, features: Float[Tensor, "*S D"]) -> Float[Tensor, "*S"]:
        """The scalar at distance 0."""
        return twohot_decode(self(features)[..., 0, :], -self.bin_range, self.bin_range)


class ContinueHead(nn.Module):
    """Logits of "the episode goes on at step t + n", n = 0 .. M - 1."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = MLP(width, config.num_distances, config, out_scale=0.0)

    def forward(self, features: Float[Tensor, "*S D"]) -> Float[Tensor, "*S M"]:
        return self.mlp(features)

    def mean(self, features: Float[Tensor, "*S D"]) -> Float[Tensor, "*S"]:
        """Probability that the episode goes on, at distance 0."""
        return self.mlp(features)[..., 0].sigmoid()
