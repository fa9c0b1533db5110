"""The transformer against a plain one written here, in results, in gradients and in what a step costs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dreamer.models.transformer import Layer, Transformer, TransformerConfig, compile_passes, grid_angles, rope_angles

GRID, WIDTH, CONTEXT = (2, 2), 32, 4
TOKENS = 4


def make(**changes: Any) -> Transformer:
    settings = {"width": WIDTH, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "time_every": 2, "context_length": CONTEXT}
    config = TransformerConfig(**(settings | changes))
    model = Transformer(config, grid_angles(GRID, config.head_width)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x: (..., E), angles: (E / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def plain_attention(layer: Layer, config: TransformerConfig, tokens: Tensor, angles: Tensor, sees: Tensor) -> Tensor:
    """One sequence (L, D), a head and a query at a time. sees: (L, L)."""
    attention, heads, width = layer.attention, config.num_heads, config.head_width
    q, k, v = (tokens @ attention.qkv.weight.T).split([heads * width, config.num_kv_heads * width, config.num_kv_heads * width], dim=-1)
    out = []
    for head in range(heads):
        shared = head // (heads // config.num_kv_heads)
        mine, theirs = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
        turned_q = plain_rotate(plain_norm(q[:, mine], attention.q_norm.weight), angles)
        turned_k = plain_rotate(plain_norm(k[:, theirs], attention.k_norm.weight), angles)
        logits = turned_q @ turned_k.T / math.sqrt(width)
        if config.logit_softcap is not None:
            logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        out.append(logits.masked_fill(~sees, -math.inf).softmax(-1) @ v[:, theirs])
    return torch.cat(out, dim=-1) @ attention.out.weight.T


def plain(model: Transformer, x: Tensor, num_agent: int = 0, no_history: Tensor | None = None) -> Tensor:
    """All rows, steps and tokens in loops, with full masks."""
    config, (batch, time, tokens, _) = model.config, x.shape
    place, clock = grid_angles(GRID, config.head_width), rope_angles(torch.arange(time), config.head_width)
    reads = torch.ones(tokens, tokens, dtype=torch.bool)
    reads[: tokens - num_agent, tokens - num_agent :] = False
    age = torch.arange(time)[:, None] - torch.arange(time)
    for layer in model.layers:
        normed = plain_norm(x, layer.attention_norm.weight)
        rows = []
        for b in range(batch):
            alone = no_history is not None and bool(no_history[b])
            window = (age >= 0) & (age < (1 if alone else config.context_length))
            if layer.is_time:
                parts = [plain_attention(layer, config, normed[b, :, s], clock, window) for s in range(tokens)]
                rows.append(torch.stack(parts, dim=1))
            else:
                rows.append(torch.stack([plain_attention(layer, config, normed[b, t], place, reads) for t in range(time)]))
        x = x + torch.stack(rows)
        gate, up = (plain_norm(x, layer.mlp_norm.weight) @ layer.mlp.gate_up.weight.T).chunk(2, dim=-1)
        x = x + (gate * gate.sigmoid() * up) @ layer.mlp.down.weight.T
    return plain_norm(x, model.norm.weight)


@pytest.mark.parametrize("time", [CONTEXT, 2 * CONTEXT, 2 * CONTEXT + 1, 3 * CONTEXT])  # the last two are cut into windows
@pytest.mark.parametrize("changes", [{}, {"logit_softcap": None}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "logit_softcap": None}])
@pytest.mark.parametrize("situation", ["whole", "agent", "no history"])
def test_results_and_gradients_are_those_of_the_plain_transformer(time: int, changes: dict[str, Any], situation: str) -> None:
    model, x = make(**changes), torch.randn(2, time, TOKENS, WIDTH)
    case = {"whole": {}, "agent": {"num_agent": 1}, "no history": {"no_history": torch.tensor([True, False])}}[situation]
    expected, found = plain(model, x, **case), model(x, **case)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(found)
    parameters = list(model.parameters())
    of_fast, of_plain = (torch.autograd.grad((out * direction).sum(), parameters) for out in (found, expected))
    for fast, slow in zip(of_fast, of_plain, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "logit_softcap": None}])
@torch.no_grad()
def test_step_by_step_with_a_cache_gives_the_plain_result(changes: dict[str, Any]) -> None:
    model, x = make(**changes), torch.randn(2, 11, TOKENS, WIDTH)
    cache = model.new_cache(2, TOKENS)
    out = [model(x[:, :3], num_agent=1, cache=cache, write=True)]
    for t in range(3, 11):
        for _ in range(2):  # passes that are not kept, without the agent token
            model(torch.randn(2, 1, TOKENS - 1, WIDTH), cache=cache)
        out.append(model(x[:, t : t + 1], num_agent=1, cache=cache, write=True))
    torch.testing.assert_close(torch.cat(out, dim=1), plain(model, x, num_agent=1), rtol=1e-4, atol=1e-4)


def flops_per_step(model: Transformer, time: int) -> float:
    """Forward and backward. Capped attention runs as matrix products, which are all counted."""
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, time, TOKENS, WIDTH), no_history=torch.tensor([False])).sum().backward()
    return counter.get_total_flops() / time


def test_a_step_of_a_long_sequence_costs_what_one_of_two_contexts_costs() -> None:
    """Time layers alone, so that full attention would show: its share of 256 steps would be 32 times that of 8."""
    model = make(num_layers=1, time_every=1)
    two_contexts = flops_per_step(model, 2 * CONTEXT)
    assert flops_per_step(model, CONTEXT) < two_contexts
    for time in (16, 64, 256):
        assert flops_per_step(model, time) == pytest.approx(two_contexts, rel=1e-6)


@torch.no_grad()
def test_rings_are_read_where_they_are() -> None:
    """With several rows and without the agent token too: a copy of the ring for each pass would cost more than the attention."""
    model = make()
    cache = model.new_cache(3, TOKENS)
    for tokens in (TOKENS, TOKENS - 1):
        keys, values = cache.layer(0, tokens)
        assert keys.shape == values.shape == (tokens * 3, 4, CONTEXT, WIDTH // 4)
        assert keys.data_ptr() == cache.keys[0].data_ptr() and values.data_ptr() == cache.values[0].data_ptr()


@torch.no_grad()
def test_the_ring_has_the_precision_of_autocast() -> None:
    model = make()
    assert model.new_cache(1, TOKENS).keys[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.new_cache(1, TOKENS).keys[0].dtype == torch.bfloat16


COMPILED = """
import torch
from dreamer.models.transformer import Layer, Transformer, TransformerConfig, compile_layers, grid_angles

Layer.compile = lambda self: torch.nn.Module.compile(self, backend="eager", fullgraph=True)
config = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=4)
model, x = Transformer(config, grid_angles((2, 2), 8)), torch.randn(2, 6, 4, 16)

def passes():
    whole = model(x, num_agent=1, no_history=torch.tensor([True, False]))
    gradients = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
    with torch.no_grad():
        cache = model.new_cache(2, 4)
        return whole, gradients, [model(piece, num_agent=1, cache=cache, write=True) for piece in x.split([3, 1, 1, 1], dim=1)]

expected, names = passes(), list(model.state_dict())
compile_layers(model)
torch.testing.assert_close(passes(), expected, rtol=1e-4, atol=1e-5)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
assert list(model.state_dict()) == names
"""


def test_compiled_layers_are_traced_whole_and_compute_the_same() -> None:
    """In a process without this one's checks of shapes, and without generating code, which takes a minute."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]


COMPILED_PASSES = """
import copy, torch
from dreamer.models.transformer import Transformer, TransformerConfig, compile_passes, grid_angles

compiler = torch.compile
torch.compile = lambda function, mode=None: compiler(function, backend="eager", fullgraph=True)
config = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=4)
model = Transformer(config, grid_angles((1, 4), 8))

def dream(model, batch):
    torch.manual_seed(0)
    cache, found = model.new_cache(batch, 4), [torch.randn(batch, 3, 4, 16)]
    with torch.inference_mode():
        found.append(model(found[0], num_agent=1, cache=cache, write=True))
        for _ in range(12):  # three contexts: the ring goes round
            x = torch.randn(batch, 1, 4, 16)
            found += [model(x[:, :, :3], cache=cache).clone(), model(x, num_agent=1, cache=cache, write=True).clone()]
    return found[1:]

expected = {batch: dream(model, batch) for batch in (1, 5, 7)}
plain = copy.deepcopy(model)
compile_passes(model)
compile_passes(model)  # once is enough
for batch in (1, 5, 7, 1):
    torch.testing.assert_close(dream(model, batch), expected[batch], rtol=1e-4, atol=1e-5)
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
assert 3 <= graphs <= 6, graphs  # three shapes for one clip, three for any other number of them
other = copy.deepcopy(model)  # compiled too, with weights of its own
torch.nn.init.zeros_(other.norm.weight)
assert not any(step.any() for step in dream(other, 1)) and dream(model, 1)[0].any()
torch.autograd.grad(model(torch.randn(1, 3, 4, 16)).sum(), list(model.parameters()), allow_unused=True)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # with gradients it stays as it was
"""


def test_compiled_dreams_are_made_for_shapes_alone_and_compute_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_PASSES], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and "recompile" not in done.stderr, done.stderr[-2000:]


@pytest.mark.gpu
def test_a_compiled_pass_on_a_gpu_is_one_graph_and_computes_the_same() -> None:
    model = make(logit_softcap=None).cuda()
    x = torch.randn(2, 12, TOKENS, WIDTH, device="cuda")

    def dream() -> list[Tensor]:
        cache = model.new_cache(2, TOKENS)
        with torch.inference_mode():
            return [model(step, num_agent=1, cache=cache, write=True).clone() for step in x.split(1, dim=1)]

    expected = dream()
    compile_passes(model)
    for _ in range(3):  # warm up, capture, replay; then with the rings of another dream
        torch.testing.assert_close(dream(), expected, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
