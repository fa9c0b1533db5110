"""What torchrun starts in tests/training/test_distributed.py: bytes a parameter that fsdp gathers and sends in a step of phase 1.

python ranks_traffic.py: a line of JSON, by whether rows bootstrap and whether activations are computed again.
"""

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dreamer.losses import ShortcutForcingConfig
from dreamer.models import Agent, AgentConfig
from dreamer.training.distributed import Parallel, Ranks, connected
from dreamer.training.loop import TrainConfig, Trainer
from dreamer.training.phase1 import Phase1
from dreamer.types import ActionComponent, ActionSpace, Batch

SPACE = ActionSpace((ActionComponent("move", "categorical", 5),))
LAYERS = {"width": 64, "num_layers": 6, "num_heads": 2, "num_kv_heads": 2, "time_every": 2, "context_length": 8}
travelled: Counter[str] = Counter()


# by their names before PyTorch 2.13 too; which argument is the whole tensor: all weights, all gradients
GATHER = {"all_gather_single": "output_tensor", "all_gather_into_tensor": "output_tensor"}
SCATTER = {"reduce_scatter_single": "input", "reduce_scatter_tensor": "input"}


def count(name: str, whole: str) -> None:
    """Note the bytes of a collective's argument ``whole``."""
    collective = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        tensor = inspect.signature(collective).bind(*args, **kwargs).arguments[whole]
        travelled["gather" if name in GATHER else "scatter"] += tensor.numel() * tensor.element_size()
        return collective(*args, **kwargs)

    setattr(dist, name, counted)


def step(ranks: Ranks, bootstrap: float, is_checkpointed: bool) -> list[float]:
    config = AgentConfig.model_validate({"dynamics": {"transformer": LAYERS, "max_steps": 8}, "heads": {"hidden": 8, "num_distances": 2}})
    agent = Agent(config, action_space=SPACE, token_grid=(2, 2), latent_channels=4, actions_per_step=1)
    phase = Phase1(agent, ShortcutForcingConfig(bootstrap_fraction=bootstrap))
    num_parameters = sum(p.numel() for p in phase.parameters() if p.requires_grad)
    train = TrainConfig.model_validate({"steps": 9, "precision": "bf16", "activation_checkpointing": is_checkpointed})
    trainer = Trainer(phase, train, Path("nowhere"), seed=0, settings={}, model_info={}, parallel=Parallel(ranks, "fsdp"))
    actions, known = torch.zeros(2, 4, 1, SPACE.num_columns), torch.ones(2, 4, 1, dtype=torch.bool)
    row, of_rows = torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool)
    batch = Batch(
        latents=torch.randn(2, 4, 4, 4),
        prev_actions=actions,
        prev_action_mask=known,
        actions=actions,
        action_mask=known,
        rewards=row,
        terminals=row.bool(),
        task=of_rows.long(),
        has_rewards=of_rows,
        is_relevant=of_rows,
    )
    travelled.clear()
    trainer.train_step([batch])
    return [travelled[name] / num_parameters for name in ("gather", "scatter")]


ranks = Ranks.from_environment()
for name, whole in (GATHER | SCATTER).items():
    if hasattr(dist, name):
        count(name, whole)
with connected(ranks, torch.device("cpu")):
    found = [step(ranks, bootstrap, is_checkpointed) for bootstrap in (0.0, 0.5) for is_checkpointed in (False, True)]
    if ranks.is_main:
        print("traffic", json.dumps(found), flush=True)
