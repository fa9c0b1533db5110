"""Which parts learn in a phase, and which stand still: one backward pass, and where its gradient arrived."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import Phase2
from dreamer.training.phase3 import Phase3
from dreamer.types import Batch

PARTS = ("dynamics", "policy", "reward", "continue_", "value")
# Written down here once more, so that a phase which trains something else is found out.
LEARNS: dict[type[nn.Module], tuple[str, ...]] = {
    Phase1: ("dynamics",),
    Phase2: ("dynamics", "policy", "reward", "continue_"),
    Phase3: ("policy", "value"),
}


@dataclass(frozen=True)
class PartFlow:
    """One part after a backward pass. Counts are of parameters."""

    part: str
    trainable: int
    frozen: int
    reached: int  # in tensors that got a gradient which is not zero
    is_training: bool  # else in eval mode
    expected: str  # "learns", "frozen", or "trainable" where the batch holds nothing that it could learn from
    problem: str  # empty if it is as expected

    def row(self) -> str:
        mode = "train" if self.is_training else "eval"
        verdict = f"FAILS: {self.problem}" if self.problem else "ok"
        return f"  {self.part:<10}{self.trainable:>14,}{self.frozen:>14,}{self.reached:>14,}  {mode:<6}{self.expected:<11}{verdict}"


HEADER = f"  {'part':<10}{'trainable':>14}{'frozen':>14}{'got gradient':>14}  {'mode':<6}{'expected':<11}"


def gradient_flow(
    phase: Phase1 | Phase2 | Phase3, batch: Batch, *, tokenizer: nn.Module | None = None, seed: int = 0
) -> tuple[PartFlow, ...]:
    """One forward and backward pass of ``phase`` on ``batch``, in training mode. No weight changes, and no gradient is left behind.

    ``tokenizer``: the one that made the latents, to be seen standing still beside the phase.
    """
    parts = {"tokenizer": tokenizer} if tokenizer is not None else {}
    parts |= {part: getattr(phase.model, part) for part in PARTS}
    if isinstance(phase, Phase3):
        parts["prior"] = phase.prior
    for module in parts.values():
        module.zero_grad(set_to_none=True)
    phase.train()
    device = phase.model.dynamics.device
    step = phase.config.value_only_steps if isinstance(phase, Phase3) else 0  # late enough that the policy learns too
    loss, _ = phase(batch.to(device), step, torch.Generator(device).manual_seed(seed))
    if loss.requires_grad:  # not where all is frozen, which is seen below
        loss.backward()
    untaught = _untaught(phase, batch) if isinstance(phase, Phase2) else ()
    flows = []
    for part, module in parts.items():
        expected = "trainable" if part in untaught else "learns" if part in LEARNS[type(phase)] else "frozen"
        is_still = part in ("tokenizer", "prior") or isinstance(phase, Phase3)  # these must also be in eval mode
        flows.append(_part_flow(part, module, expected, expects_eval=expected == "frozen" and is_still))
        module.zero_grad(set_to_none=True)
    return tuple(flows)


def _untaught(phase: Phase2, batch: Batch) -> tuple[str, ...]:
    """Heads that find nothing in the batch to learn from: actions or rewards that nobody knows, no episode's end (a trained continue
    head is so sure then that its gradient rounds to 0), or a term with the weight 0."""
    actions_known, rewards_known = bool((batch.action_mask & batch.is_relevant[:, None, None]).any()), bool(batch.has_rewards.any())
    weights = {"policy": phase.config.policy_weight, "reward": phase.config.reward_weight, "continue_": phase.config.continue_weight}
    known = {"policy": actions_known, "reward": rewards_known, "continue_": rewards_known and bool(batch.terminals.any())}
    return tuple(part for part, weight in weights.items() if not (weight and known[part]))


def _part_flow(part: str, module: nn.Module, expected: str, *, expects_eval: bool) -> PartFlow:
    parameters = list(module.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    trainable, frozen = (sum(p.numel() for p in parameters if p.requires_grad == wanted) for wanted in (True, False))
    reached = sum(g.numel() for g in gradients if g.any())
    is_training = any(m.training for m in module.modules())
    problem = ""
    if expected == "frozen":
        if trainable:
            problem = "asks for gradients"
        elif gradients:
            problem = "got a gradient"
        elif expects_eval and is_training:
            problem = "is not in eval mode"
    elif frozen:
        problem = "some of it is frozen"
    elif not all(bool(g.isfinite().all()) for g in gradients):
        problem = "its gradient is not finite"
    elif expected == "learns" and not reached:
        problem = "no gradient arrived"
    return PartFlow(part, trainable, frozen, reached, is_training, expected, problem)
