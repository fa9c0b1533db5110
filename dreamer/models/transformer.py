"""The space/time transformer that tokenizer and dynamics share (Dreamer 4, Section 3.1).

Shape letters: B batch, T time steps, S tokens of a step, D width, G query heads, Gk key/value heads, E head width, C context slots.

Pre-RMSNorm, RoPE, SwiGLU, QK-norm, attention logit soft-capping and grouped-query attention. Space layers attend within a step,
every ``time_every``-th layer attends to the same token's past instead. The last ``num_agent`` tokens of a step read all other
tokens, and nothing reads them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreamer.types import Config

Rotation = tuple[Float[Tensor, "L 1 E"], Float[Tensor, "L 1 E"]]


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


def rotation(angles: Float[Tensor, "L half"]) -> Rotation:
    """What ``rotate`` multiplies with: cosines and signed sines, (L, 1, E) each."""
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], dim=-1).unsqueeze(1), torch.cat([-sin, sin], dim=-1).unsqueeze(1)


def rotate(x: Float[Tensor, "... L G E"], by: Rotation) -> Float[Tensor, "... L G E"]:
    """Apply RoPE: pairs (x_i, x_{i + E/2}) turn by their angle."""
    cos, sin = (table.to(x.dtype) for table in by)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def attend(
    q: Float[Tensor, "b G L E"],
    k: Float[Tensor, "b Gk M E"],
    v: Float[Tensor, "b Gk M E"],
    mask: Bool[Tensor, "#b 1 L M"] | None,
    logit_softcap: float | None,
) -> Float[Tensor, "b G L E"]:
    """Softmax attention; ``mask`` is True where a query may look. Logits are capped at ``softcap * tanh(logits / softcap)``."""
    heads = q.shape[1]
    if (shared := heads // k.shape[1]) > 1:  # query heads that share a key head become rows of one matrix, so that no key is repeated
        q = rearrange(q, "b (g r) l e -> b g (r l) e", r=shared)
        mask = None if mask is None else mask.repeat(1, 1, shared, 1)
    is_slow = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"  # the fused kernel's backward pass is
    if logit_softcap is None and not is_slow:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        out = logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return rearrange(out, "b g (r l) e -> b (g r) l e", r=shared) if shared > 1 else out


@dataclass
class _TimeView:
    """What every time layer of one forward pass shares."""

    rotation: Rotation
    mask: Tensor | None  # (1 or rows, 1, queries, keys); None: every query sees every key
    window: int | None = None  # C, where queries and keys are cut into windows
    num_past: int = 0  # slots of the ring that several steps at once read
    slots: Tensor | None = None  # where new keys go in the ring; None: they are not kept


@dataclass
class TimeCache:
    """Keys and values of the last C time steps, a ring a time layer. Memory does not grow with the number of steps.

    Keys are stored already rotated at their absolute step, so the order of the slots does not matter. The n-th step fills slot n mod C,
    which holds the step that just left the window: until a pass keeps its step, that slot is scratch space.
    """

    keys: list[Tensor]  # a time layer each: (S, B, Gk, C, E); tokens first, so that a pass without the last ones reads one piece of memory
    values: list[Tensor]
    num_steps: int = 0  # kept so far, those that have left the ring with them
    first_step: int = 0  # where the first of them stood
    num_blocks: int = 1  # rows of B that each video fills, side by side
    next_step: _TimeView | None = None  # what the passes of the next step share, made by the first of them

    def rows(self, rows: Int[Tensor, " b"]) -> TimeCache:
        """The cache of some of the videos."""

        def chosen(ring: Tensor) -> Tensor:
            return ring.unflatten(1, (-1, self.num_blocks))[:, rows.to(ring.device)].flatten(1, 2)

        return dataclasses.replace(self, keys=[chosen(k) for k in self.keys], values=[chosen(v) for v in self.values])

    def layer(self, index: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The rings of one time layer and the first ``num_tokens`` tokens, (S B) Gk C E each. They are views."""
        return self.keys[index][:num_tokens].flatten(0, 1), self.values[index][:num_tokens].flatten(0, 1)


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, head_width = config.num_heads, config.num_kv_heads, config.head_width
        self.qkv = nn.Linear(config.width, (heads + 2 * kv_heads) * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, config.width, bias=False)
        self.q_norm = RMSNorm(head_width)
        self.k_norm = RMSNorm(head_width)

    def project(self, x_blD: Tensor, by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (normalised, rotated) and values, each (b, heads, l, E)."""
        heads, kv_heads, head_width = self.config.num_heads, self.config.num_kv_heads, self.config.head_width
        qk, v = self.qkv(x_blD).unflatten(-1, (-1, head_width)).split([heads + kv_heads, kv_heads], dim=2)
        scale = torch.cat([self.q_norm.weight.expand(heads, -1), self.k_norm.weight.expand(kv_heads, -1)])  # both norms in one pass
        qk = rotate(F.rms_norm(qk, (head_width,), eps=self.q_norm.eps) * scale.to(qk.dtype), by)
        q, k = qk.split([heads, kv_heads], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def join(self, attended_bGlE: Tensor) -> Tensor:
        return self.out(attended_bGlE.transpose(1, 2).flatten(2))


class SpaceAttention(Attention):
    """Tokens of one step attend to each other; the last ``num_agent`` read everything and are read by nothing."""

    def forward(self, x_BTSD: Tensor, by: Rotation, num_agent: int) -> Tensor:
        q, k, v = self.project(x_BTSD.flatten(0, 1), by)
        cap = self.config.logit_softcap
        if num_agent:
            main = q.shape[2] - num_agent
            # two calls instead of a mask: what the other tokens compute cannot contain the agent token
            world = attend(q[:, :, :main], k[:, :, :main], v[:, :, :main], None, cap)
            attended = torch.cat([world, attend(q[:, :, main:], k, v, None, cap)], dim=2)
        else:
            attended = attend(q, k, v, None, cap)
        return self.join(attended).unflatten(0, x_BTSD.shape[:2])


class TimeAttention(Attention):
    """Each token attends to its own past, at most ``context_length`` steps including this one."""

    def forward(self, x_BTSD: Tensor, view: _TimeView, ring: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, time = x_BTSD.shape[:2]
        q, k, v = self.project(x_BTSD.permute(2, 0, 1, 3).flatten(0, 1), view.rotation)
        if ring is not None:
            k, v = (self._with_past(cached, new, view) for cached, new in zip(ring, (k, v), strict=True))
        if view.window:
            q, k, v = in_windows(q, view.window, 0), in_windows(k, view.window, view.window), in_windows(v, view.window, view.window)
        attended = attend(q, k.to(q.dtype), v.to(q.dtype), view.mask, self.config.logit_softcap)
        if view.window:
            attended = rearrange(attended, "(b n) g c e -> b g (n c) e", n=-(-time // view.window))[:, :, :time]
        return self.join(attended).unflatten(0, (-1, batch)).permute(1, 2, 0, 3)

    @staticmethod
    def _with_past(cached: Tensor, new: Tensor, view: _TimeView) -> Tensor:
        """What is read: the ring, with the new steps in it or after it."""
        if view.slots is not None and new.shape[2] == 1:  # the usual case: one step goes to its slot, and nothing else is copied
            cached.index_copy_(2, view.slots, new.to(cached.dtype))
            return cached
        read = torch.cat([cached[:, :, : view.num_past], new], dim=2)
        if view.slots is not None:
            cached.index_copy_(2, view.slots, new[:, :, -len(view.slots) :].to(cached.dtype))
        return read


def in_windows(x: Float[Tensor, "b G T E"], length: int, before: int) -> Float[Tensor, "bn G W E"]:
    """Cut time into windows of ``length`` steps, each with the ``before`` steps before it; zeros stand where there are none."""
    x = F.pad(x, (0, 0, before, -x.shape[2] % length))
    return rearrange(x.unfold(2, before + length, length), "b g n e w -> (b n) g w e")


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
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.is_checkpointed = False  # by ``checkpoint_layers``

    def forward(self, x_BTSD: Tensor, *where) -> Tensor:
        if self.is_checkpointed and torch.is_grad_enabled():
            draws = isinstance(self.dropout, nn.Dropout)  # then the same again in the second pass
            return checkpoint(self._forward, x_BTSD, *where, use_reentrant=False, preserve_rng_state=draws)
        return self._forward(x_BTSD, *where)

    def _forward(self, x_BTSD: Tensor, *where) -> Tensor:
        x_BTSD = x_BTSD + self.dropout(self.attention(self.attention_norm(x_BTSD), *where))
        return x_BTSD + self.dropout(self.mlp(self.mlp_norm(x_BTSD)))


class Transformer(nn.Module):
    """A stack of space and time layers over tokens (B, T, S, D), with a final RMSNorm.

    ``token_angles`` (S, E/2) holds each token's RoPE angles in space; tokens without a place get zeros.
    """

    space_cos: Tensor  # see ``rotation``
    space_sin: Tensor

    def __init__(self, config: TransformerConfig, token_angles: Float[Tensor, "S half"]) -> None:
        super().__init__()
        self.config = config
        every = config.time_every
        self.layers = nn.ModuleList(Layer(config, every > 0 and i % every == every - 1) for i in range(config.num_layers))
        self.norm = RMSNorm(config.width)
        self.num_time_layers = sum(bool(layer.is_time) for layer in self.layers)
        self._compiled: Callable[..., Tensor] | None = None  # ``_run_layers``, by ``compile_passes``
        space_cos, space_sin = rotation(token_angles)
        self.register_buffer("space_cos", space_cos, persistent=False)
        self.register_buffer("space_sin", space_sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("out.weight", "down.weight")):  # residual branches start small
                weight.data.mul_((2 * config.num_layers) ** -0.5)

    def new_cache(self, batch_size: int, num_tokens: int) -> TimeCache:
        """An empty cache of C slots a time layer, in the precision that autocast sets."""
        config, device = self.config, self.norm.weight.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        shape = (num_tokens, batch_size, config.num_kv_heads, config.context_length, config.head_width)
        keys, values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(self.num_time_layers)] for _ in range(2))
        return TimeCache(keys, values)

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
        if not self.num_time_layers:
            view = None
        elif cache is None:
            view = self._sequence_view(x, no_history)
        elif x.shape[1] == 1:
            view = cache.next_step = cache.next_step or self._step_view(cache)
        else:
            view = self._piece_view(x.shape[1], cache, write)
        # a pass without the last tokens (the agent token) reads the others' part of the cache
        rings = [None if cache is None else cache.layer(i, x.shape[2]) for i in range(self.num_time_layers)]
        if self._compiled is None or torch.is_grad_enabled():
            x = self._run_layers(x, view, rings, num_agent)
        else:
            if x.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()  # what the last pass returned may be written over: nobody holds it
                for ring in itertools.chain.from_iterable(filter(None, rings)):
                    torch._dynamo.mark_static_address(ring, guard=False)  # the graph writes it where it is
            x = self._compiled(self, x, view, rings, num_agent)
        if cache is not None and write:
            cache.num_steps, cache.next_step = cache.num_steps + x.shape[1], None
        return x

    def _run_layers(self, x: Tensor, view: _TimeView | None, rings: list[tuple[Tensor, Tensor] | None], num_agent: int) -> Tensor:
        by, past = (self.space_cos[: x.shape[2]], self.space_sin[: x.shape[2]]), iter(rings)
        for layer in self.layers:
            x = layer(x, view, next(past)) if layer.is_time else layer(x, by, num_agent)
        return self.norm(x)

    def _rotation(self, steps: Tensor) -> Rotation:
        return rotation(rope_angles(steps, self.config.head_width))

    def _sequence_view(self, x: Tensor, no_history: Tensor | None) -> _TimeView:
        """Whole sequences. Where these are long, each window of C steps looks at itself and the window before, so that a step costs the
        same in a sequence of any length."""
        (_, time, tokens, _), context = x.shape, self.config.context_length
        window = context if time > 2 * context else None
        steps = torch.arange(time, device=x.device)
        query, key = rearrange(steps, "t -> 1 t 1"), rearrange(steps, "t -> 1 1 t")
        if window:
            start = rearrange(torch.arange(0, time, window, device=x.device), "n -> n 1 1")
            query = start + torch.arange(window, device=x.device)[:, None]
            key = start + torch.arange(-window, window, device=x.device)
        age = query - key
        mask = rearrange((age >= 0) & (age < context) & (key >= 0), "n l m -> 1 n l m")
        if no_history is not None:
            mask = mask & (~rearrange(no_history, "b -> b 1 1 1") | (age == 0))
        if len(mask) > 1 or window:
            mask = mask.expand(len(x), -1, -1, -1).repeat(tokens, 1, 1, 1)
        return _TimeView(self._rotation(steps), rearrange(mask, "b n l m -> (b n) 1 l m"), window)

    def _step_view(self, cache: TimeCache) -> _TimeView:
        """The one step after those in the cache. It reads all of the ring, always: shapes that stay let compiled code stay."""
        context, device = self.config.context_length, cache.keys[0].device
        step = torch.tensor([cache.num_steps], device=device)
        mask = rearrange(torch.arange(context, device=device) <= step, "m -> 1 1 1 m")
        return _TimeView(self._rotation(step + cache.first_step), mask, slots=step % context)

    def _piece_view(self, time: int, cache: TimeCache, write: bool) -> _TimeView:
        """The ``time`` steps after those in the cache."""
        context, device = self.config.context_length, cache.keys[0].device
        steps = torch.arange(cache.num_steps, cache.num_steps + time, device=device)
        num_past = min(cache.num_steps, context)
        last = cache.num_steps - 1
        held = last - (last - torch.arange(num_past, device=device)) % context  # the step in each slot
        age = steps[:, None] - torch.cat([held, steps])
        mask = rearrange((age >= 0) & (age < context), "l m -> 1 1 l m")
        by = self._rotation(steps + cache.first_step)
        return _TimeView(by, mask, num_past=num_past, slots=steps[-context:] % context if write else None)


def compile_passes(transformer: Transformer) -> None:
    """Compile its passes without gradients, all layers as one, in place and once: dreams are the faster for it. On CUDA a pass becomes a
    CUDA graph. The first pass of each shape takes half a minute; how far a dream has come changes no shape, so that a dream has three
    (context, denoising, keeping)."""
    if transformer._compiled is None:
        on_cuda = transformer.norm.weight.is_cuda
        transformer._compiled = torch.compile(Transformer._run_layers, mode="reduce-overhead" if on_cuda else None)


def checkpoint_layers(module: nn.Module) -> None:
    """Let the trained transformer layers inside ``module`` keep only what comes in, and compute the rest again in the backward pass: the
    same numbers from less memory. Raises ``ValueError`` if there are none."""
    layers = [m for m in module.modules() if isinstance(m, Layer) and any(p.requires_grad for p in m.parameters())]
    if not layers:
        raise ValueError("train.activation_checkpointing is true, but no transformer layer is trained here: it would have no effect")
    for layer in layers:
        layer.is_checkpointed = True


def compile_layers(module: nn.Module) -> None:
    """Compile the transformer layers inside ``module`` in place, each kind once. The first passes take a minute longer."""
    for layer in module.modules():
        if isinstance(layer, Layer):
            layer.compile()
