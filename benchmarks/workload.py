"""The world model that the benchmarks run: 6.3 million parameters in 8 layers, on latents without content.

All weights are random: they decide what comes out, not how long it takes.
"""

from __future__ import annotations

import torch

from dreamer.models import Agent, AgentConfig
from dreamer.types import ActionComponent, ActionSpace, Batch

STEPS = 32  # T of a training batch, and the reach of attention over time
TOKEN_GRID, CHANNELS = (4, 4), 16
TOKENS = TOKEN_GRID[0] * TOKEN_GRID[1]
SPACE = ActionSpace((ActionComponent("action", "categorical", 8),))
TRANSFORMER = {"width": 256, "num_layers": 8, "time_every": 4, "num_heads": 4, "num_kv_heads": 4, "context_length": STEPS}
TRANSFORMER |= {"logit_softcap": None}  # as in the demo: the fused attention kernel
CONFIG = AgentConfig.model_validate({"dynamics": {"num_registers": 4, "transformer": TRANSFORMER}})


def make_agent(device: torch.device, config: AgentConfig = CONFIG) -> Agent:
    torch.manual_seed(0)
    return Agent(config, action_space=SPACE, token_grid=TOKEN_GRID, latent_channels=CHANNELS).to(device)


def make_batch(rows: int, steps: int, device: torch.device) -> Batch:
    """Clips in which every action is known."""
    actions, known = torch.randint(0, 8, (rows, steps, 1, 1)).float(), torch.ones(rows, steps, 1, dtype=torch.bool)
    return Batch(
        latents=torch.randn(rows, steps, TOKENS, CHANNELS),
        prev_actions=actions,
        prev_action_mask=known,
        actions=actions.clone(),
        action_mask=known.clone(),
        rewards=torch.zeros(rows, steps),
        terminals=torch.zeros(rows, steps, dtype=torch.bool),
        task=torch.zeros(rows, dtype=torch.long),
        has_rewards=torch.ones(rows, dtype=torch.bool),
        is_relevant=torch.ones(rows, dtype=torch.bool),
    ).to(device)
