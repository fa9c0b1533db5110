"""The space/time transformer that tokenizer and dynamics share (Dreamer 4, Section 3.1).

Shape letters: B batch, T time steps, S tokens of a step, D width, G query heads, Gk key/value heads, E head width, C context slots.

Pre-RMSNorm, RoPE, SwiGLU, QK-norm, attention logit soft-capping and grouped-query attention. Space layers attend within a step,
every ``time_every``-th layer attends to the same token's past instead. The last ``num_agent`` tokens of a step read all other
tokens, and nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from dreamer.types import Config


class TransformerConfig(Config):
    width: int = Field(default=256, ge=8)
    num_layers: int = Field(default=8, ge=1)
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=4, ge=1)  # fewer than num_heads: grouped-query attention
    time_every: int = Field(default=4, ge=0)  # every n-th layer attends over time; 0: none does
    mlp_ratio: float = Field(default=8 / 3, gt=0)  # hidden width of the SwiGLU, in widths
    logit_softcap: float | None = Field(default=50.0, gt=0)  # null: none, and the fused attention kernel is used
    context_length: int = Field(default=64, ge=1)  # C: a step sees itself and the C - 1 steps before it
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_heads(self) -> TransformerConfig:
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 * num_heads = {2 * self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


def rope_angles(positions: Tensor, width: int, base: float = 10_000.0) -> Float[Tensor, "L half"]:
    """Rotation angles of RoPE for 1-D positions, ``width // 2`` a position; float64 inside, so that they hold at position 1e6."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    return positions.double()[:, None] * frequencies


def grid_angles(grid: tuple[int, int], head_width: int, base: float = 100.0) -> Float[Tensor, "N half"]:
    """Axial 2-D RoPE: the first half of the rotations follow the row, the second half the column."""
    rows, columns = grid
    half = head_width // 2
    row_half = (half + 1) // 2
    row = repeat(rope_angles(torch.arange(rows), 2 * row_half, base), "r f -> (r c) f", c=columns)
    column = repeat(rope_angles(torch.arange(columns), 2 * (half - row_half), base), "c f -> (r c) f", r=rows)
    return torch.cat([row, column], dim=-1)


def rotate(x: Float[Tensor, "... L E"], cos: Float[Tensor, "L half"], sin: Float[Tensor, "L half"]) -> Float[Tensor, "... L E"]:
    """Apply RoPE: pairs (x_i, x_{i + E/2}) turn by their angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(
    q: Float[Tensor, "b G L E"],
    k: Float[Tensor, "b Gk M E"],
    v: Float[Tensor, "b Gk M E"],
    mask: Bool[Tensor, "#b 1 L M"] | None,
    logit_softcap: float | None,
) -> Float[Tensor, "b G L E"]:
    """Softmax attention; ``mask`` is True where a query may look. Logits are capped at ``softcap * tanh(logits / softcap)``."""
    if logit_softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    logits = logit_softcap * torch.tanh(logits / logit_softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@dataclass
class TimeCache:
    """Keys and values of the last C time steps, a ring a time layer. Memory does not grow with the number of steps.

    Keys are stored already rotated at their absolute step, so the order of the slots does not matter.
    """

    keys: list[Tensor]  # a time layer each: (B, S, Gk, C, E)
    values: list[Tensor]
    slot_step: Tensor  # (C,): the step that a slot holds, -1 where it is empty
    next_step: int = 0
    num_blocks: int = 1  # rows of B that each video fills, side by side

    def rows(self, rows: Int[Tensor, " b"]) -> TimeCache:
        """The cache of some of the videos."""
        rows = rows.to(self.slot_step.device)
        keys, values = ([x.unflatten(0, (-1, self.num_blocks))[rows].flatten(0, 1) for x in part] for part in (self.keys, self.values))
        return TimeCache(keys, values, self.slot_step.clone(), self.next_step, self.num_blocks)

    def advance(self, num_steps: int) -> None:
        """Mark ``num_steps`` steps as written."""
        context = len(self.slot_step)
        steps = torch.arange(self.next_step, self.next_step + num_steps, device=self.slot_step.device)[-context:]
        self.slot_step[steps % context] = steps
        self.next_step += num_steps


@dataclass
class _TimeView:
    """What every time layer of one forward pass shares: rotations, masks and where to write."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None  # (1 or B, 1, T, keys)
    slots: Tensor | None  # where new keys go in the ring; None: they are not kept


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, head_width = config.num_heads, config.num_kv_heads, config.head_width
        self.qkv = nn.Linear(config.width, (heads + 2 * kv_heads) * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, config.width, bias=False)
        self.q_norm = RMSNorm(head_width)
        self.k_norm = RMSNorm(head_width)

    def project(self, x_blD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (normalised, rotated) and values, each (b, heads, l, E)."""
        config = self.config
        qkv = rearrange(self.qkv(x_blD), "b l (g e) -> b g l e", e=config.head_width)
        q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    def join(self, attended_bGlE: Tensor) -> Tensor:
        return self.out(rearrange(attended_bGlE, "b g l e -> b l (g e)"))


class SpaceAttention(Attention):
    """Tokens of one step attend to each other; the last ``num_agent`` read everything and are read by nothing."""

    def forward(self, x_BTSD: Tensor, cos: Tensor, sin: Tensor, num_agent: int) -> Tensor:
        batch, time = x_BTSD.shape[:2]
        q, k, v = self.project(rearrange(x_BTSD, "b t s d -> (b t) s d"), cos, sin)
        cap = self.config.logit_softcap
        if num_agent:
            main = q.shape[2] - num_agent
            # two calls instead of a mask: what the other tokens compute cannot contain the agent token
            world = attend(q[:, :, :main], k[:, :, :main], v[:, :, :main], None, cap)
            attended = torch.cat([world, attend(q[:, :, main:], k, v, None, cap)], dim=2)
        else:
            attended = attend(q, k, v, None, cap)
        return rearrange(self.join(attended), "(b t) s d -> b t s d", b=batch, t=time)


class TimeAttention(Attention):
    """Each token attends to its own past, at most ``context_length`` steps including this one."""

    def forward(self, x_BTSD: Tensor, view: _TimeView, ring: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, _, tokens, _ = x_BTSD.shape
        q, k, v = self.project(rearrange(x_BTSD, "b t s d -> (b s) t d"), view.cos, view.sin)
        if ring is not None:
            keys, values = (rearrange(x, "b s g c e -> (b s) g c e") for x in ring)
            new_k, new_v = k, v
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
            if view.slots is not None:
                kept = len(view.slots)
                ring[0][..., view.slots, :] = rearrange(new_k[:, :, -kept:], "(b s) g t e -> b s g t e", b=batch).to(ring[0].dtype)
                ring[1][..., view.slots, :] = rearrange(new_v[:, :, -kept:], "(b s) g t e -> b s g t e", b=batch).to(ring[1].dtype)
        mask = view.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask.repeat_interleave(tokens, dim=0)
        attended = attend(q, k.to(q.dtype), v.to(q.dtype), mask, self.config.logit_softcap)
        return rearrange(self.join(attended), "(b s) t d -> b t s d", b=batch)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, is_time: bool) -> None:
        super().__init__()
        self.is_time = is_time
        self.attention_norm = RMSNorm(config.width)
        self.attention = TimeAttention(config) if is_time else SpaceAttention(config)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, 8 * round(config.mlp_ratio * config.width / 8))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTSD: Tensor, *where) -> Tensor:
        x_BTSD = x_BTSD + self.dropout(self.attention(self.attention_norm(x_BTSD), *where))
        return x_BTSD + self.dropout(self.mlp(self.mlp_norm(x_BTSD)))


class Transformer(nn.Module):
    """A stack of space and time layers over tokens (B, T, S, D), with a final RMSNorm.

    ``token_angles`` (S, E/2) holds each token's RoPE angles in space; tokens without a place get zeros.
    """

    space_cos: Tensor
    space_sin: Tensor

    def __init__(self, config: TransformerConfig, token_angles: Float[Tensor, "S half"]) -> None:
        super().__init__()
        self.config = config
        every = config.time_every
        self.layers = nn.ModuleList(Layer(config, every > 0 and i % every == every - 1) for i in range(config.num_layers))
        self.norm = RMSNorm(config.width)
        self.register_buffer("space_cos", token_angles.cos().float(), persistent=False)
        self.register_buffer("space_sin", token_angles.sin().float(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("out.weight", "down.weight")):  # residual branches start small
                weight.data.mul_((2 * config.num_layers) ** -0.5)

    def new_cache(self, batch_size: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> TimeCache:
        """An empty cache of C slots a time layer."""
        config, device = self.config, self.norm.weight.device
        shape = (batch_size, num_tokens, config.num_kv_heads, config.context_length, config.head_width)
        num_time = sum(bool(layer.is_time) for layer in self.layers)
        keys, values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_time)] for _ in range(2))
        return TimeCache(keys, values, torch.full((config.context_length,), -1, device=device))

    def forward(
        self,
        x: Float[Tensor, "B T S D"],
        *,
        num_agent: int = 0,
        no_history: Bool[Tensor, " B"] | None = None,
        cache: TimeCache | None = None,
        write: bool = False,
    ) -> Float[Tensor, "B T S D"]:
        """All T steps at once (causal over time), or the T steps after those in ``cache``.

        ``no_history`` marks the rows whose steps see only themselves. ``write`` keeps the new steps in the cache.
        """
        if cache is not None and no_history is not None:
            raise ValueError("no_history is for whole sequences; with a cache every row has a past")
        view = self._time_view(x, no_history, cache, write)
        tokens = x.shape[2]
        cos, sin = self.space_cos[:tokens], self.space_sin[:tokens]
        time_layer = 0
        for layer in self.layers:
            if layer.is_time:
                # without its last tokens (a pass that leaves out the agent token) a step reads its tokens' part of the cache
                ring = None if cache is None else (cache.keys[time_layer][:, :tokens], cache.values[time_layer][:, :tokens])
                x = layer(x, view, ring)
                time_layer += 1
            else:
                x = layer(x, cos, sin, num_agent)
        if cache is not None and write:
            cache.advance(x.shape[1])
        return self.norm(x)

    def _time_view(self, x: Tensor, no_history: Tensor | None, cache: TimeCache | None, write: bool) -> _TimeView:
        time, context, device = x.shape[1], self.config.context_length, x.device
        start = 0 if cache is None else cache.next_step
        steps = torch.arange(start, start + time, device=device)
        angles = rope_angles(steps, self.config.head_width)
        key_steps = steps if cache is None else torch.cat([cache.slot_step, steps])
        age = steps[:, None] - key_steps[None, :]
        mask = (age >= 0) & (age < context) & (key_steps >= 0)[None, :]
        if cache is not None:  # a slot that these very steps take over still holds its old content in this pass
            mask = rearrange(mask, "l m -> 1 1 l m")
        elif no_history is not None:
            alone = rearrange(no_history, "b -> b 1 1 1") & ~torch.eye(time, dtype=torch.bool, device=device)
            mask = mask & ~alone
        else:
            mask = rearrange(mask, "l m -> 1 1 l m")
        slots = steps[-context:] % context if write else None
        return _TimeView(angles.cos().float(), angles.sin().float(), mask, slots)
