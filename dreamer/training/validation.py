"""What is measured on held-out episodes while a phase trains. Each hook is ``hook(logger, step) -> metrics``, deterministic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dreamer.evaluation.media import image_layout, upscale
from dreamer.evaluation.open_loop import Windows, predict
from dreamer.evaluation.strips import dream_strip, dream_video
from dreamer.evaluation.video import SHUFFLED_ACTIONS, TRUE_ACTIONS, psnr_of_mse
from dreamer.imagination import Sampler, SamplerConfig
from dreamer.models import Agent
from dreamer.ops import flow
from dreamer.training.logging import RunLogger
from dreamer.training.loop import step_generator
from dreamer.training.phase0 import Phase0, Phase0Cosmos
from dreamer.training.phase1 import Phase1, shortcut_step
from dreamer.training.phase2 import Phase2
from dreamer.training.phase3 import Phase3
from dreamer.types import ActionSpace, Batch, Tokenizer

Hook = Callable[[RunLogger, int], dict[str, float]]
Pixels = UInt8[Tensor, "B F C H W"]
MAX_PICTURES = 8  # in a picture of reconstructions


def validate_tokenizer(phase: Phase0 | Phase0Cosmos, frames: Pixels) -> Hook:
    """PSNR of reconstructed held-out frames, beside that of their mean image (a tokenizer that stalls learns no more than it)."""
    mean_image = frames.float().mean((0, 1))
    mean_psnr = float(psnr_of_mse(float((frames.float() - mean_image).square().mean())))

    @torch.no_grad()
    def hook(logger: RunLogger, step: int) -> dict[str, float]:
        tokenizer = phase.model
        phase.before_export()
        decoded = torch.cat([tokenizer.decode(tokenizer.encode(part)).cpu() for part in frames.split(32)])
        mse = float((decoded.float() - frames.float()).square().mean())
        rows = [np.concatenate(list(image_layout(clip[:MAX_PICTURES, 0])), axis=1) for clip in (frames, decoded)]
        logger.image(step, "reconstruction", upscale(np.concatenate(rows), 2))
        return {"val_psnr": float(psnr_of_mse(mse)), "val_psnr_mean_image": mean_psnr}

    return hook


def validate_latent_scale(phase: Phase0Cosmos, frames: Pixels) -> Hook:
    """Mean and deviation of held-out latents: how far adaptation has moved them from what their normalisation was made for (0 and 1)."""

    @torch.no_grad()
    def hook(logger: RunLogger, step: int) -> dict[str, float]:
        latents = torch.cat([phase.model.encode(part).cpu() for part in frames.split(32)])
        return {"val_latent_mean": float(latents.mean()), "val_latent_std": float(latents.std())}

    return hook


def other_actions(space: ActionSpace, actions: Float[Tensor, "*S A"], generator: torch.Generator) -> Float[Tensor, "*S A"]:
    """Another action of the space for each one: another category, flipped bits, another place in the range."""
    other = torch.empty_like(actions)
    for component, columns in space.slices():
        values, device = actions[..., columns], actions.device
        if component.kind == "categorical":
            shift = torch.randint(1, max(component.size, 2), values.shape, generator=generator, device=device)
            other[..., columns] = (values + shift) % component.size
        elif component.kind == "binary":
            other[..., columns] = 1 - values
        else:
            drawn = torch.rand(values.shape, generator=generator, device=device)
            other[..., columns] = component.low + drawn * (component.high - component.low)
    return other


@torch.no_grad()
def action_gap(agent: Agent, batch: Batch, context_signal: float, generator: torch.Generator) -> dict[str, float]:
    """How much the action matters for the next latents: the last step of each row is predicted from pure noise (tau = 0), after a past
    at ``context_signal``, once with the action that was taken and once with another one.

    ``action_gap_db`` is 10 log10 of the ratio of the two squared errors: 0 as long as the model ignores actions. Conditioning on
    actions comes late, long after the loss looks healthy.
    """
    dynamics = agent.dynamics
    max_steps = dynamics.config.max_steps
    signal_idx = torch.full(batch.latents.shape[:2], flow.signal_index(context_signal, max_steps), device=batch.latents.device)
    signal_idx[:, -1] = 0
    finest = torch.full_like(signal_idx, flow.num_step_sizes(max_steps) - 1)
    noise = torch.randn(batch.latents.shape, generator=generator, device=batch.latents.device)
    noisy = flow.add_noise(batch.latents, noise, signal_idx / max_steps)
    changed = batch.prev_actions.clone()
    changed[:, -1] = other_actions(agent.action_space, changed[:, -1], generator)
    errors = []
    for actions in (batch.prev_actions, changed):
        predicted = dynamics(noisy, signal_idx, finest, actions, batch.prev_action_mask).latents
        errors.append(float((predicted[:, -1] - batch.latents[:, -1]).square().mean()))
    return {
        "val_next_mse": errors[0],
        "val_next_mse_other_action": errors[1],
        "val_action_gap_db": float(10 * np.log10(max(errors[1], 1e-12) / max(errors[0], 1e-12))),
    }


def validate_world_model(phase: Phase1 | Phase2, batches: Sequence[Batch], seed: int) -> Hook:
    """Held-out shortcut-forcing loss and action gap."""

    @torch.no_grad()
    def hook(logger: RunLogger, step: int) -> dict[str, float]:
        device = phase.model.dynamics.device
        rows = []
        for index, batch in enumerate(batches):
            batch = batch.to(device)
            generator = step_generator(device, seed, "validate", index)
            metrics = shortcut_step(phase.model.dynamics, phase.loss, batch, generator)[1]
            losses = {f"val_{name}": float(value) for name, value in metrics.items()}
            rows.append(losses | action_gap(phase.model, batch, phase.loss.config.context_signal, generator))
        return _mean(rows)

    return hook


def validate_heads(phase: Phase2, batches: Sequence[Batch], seed: int) -> Hook:
    """Held-out accuracy of the policy on relevant rows, and errors of the reward and continue heads, as they see the real environment."""

    @torch.no_grad()
    def hook(logger: RunLogger, step: int) -> dict[str, float]:
        agent = phase.model
        device = agent.dynamics.device
        sampler = Sampler(agent.dynamics, SamplerConfig(num_steps=1, context_signal=phase.loss.config.context_signal))
        rows = []
        for index, batch in enumerate(batches):
            batch = batch.to(device)
            state = sampler.start(len(batch.latents), task=batch.task, generator=step_generator(device, seed, "heads", index))
            features = sampler.observe(state, batch.latents, batch.prev_actions, batch.prev_action_mask)
            policy, known = agent.policy.now(features), batch.action_mask & batch.is_relevant[:, None, None]
            reward_error = (agent.reward.mean(features) - batch.rewards).abs()
            is_rewarded, rows_known = batch.rewards != 0, batch.has_rewards
            values = {
                "val_bc_loss": -policy.log_prob(batch.actions)[known].mean(),
                "val_bc_accuracy": (policy.mode() - batch.actions).abs().amax(-1).lt(0.5)[known].float().mean(),
                "val_reward_error": reward_error[rows_known].mean(),
                "val_reward_error_rewarded": reward_error[is_rewarded].mean(),
                "val_continue_error": (agent.continue_.mean(features) - (~batch.terminals).float()).abs()[rows_known].mean(),
            }
            rows.append({name: float(value) for name, value in values.items() if torch.isfinite(value)})  # a mean of nothing is left out
        return _mean(rows)

    return hook


def validate_dreams(agent: Agent, sampler: Sampler, tokenizer: Tokenizer, windows: Windows, *, context: int, fps: float, seed: int) -> Hook:
    """Open-loop dreams of a few held-out windows: a strip and a video of the first, PSNR of all with true and with shuffled actions."""
    first = 1 + tokenizer.temporal_stride * (context - 1)

    @torch.no_grad()
    def hook(logger: RunLogger, step: int) -> dict[str, float]:
        clips = predict(agent, tokenizer, sampler, windows, context, seed)
        shown = {name: clips[name][0] for name in (TRUE_ACTIONS, SHUFFLED_ACTIONS) if name in clips}
        logger.image(step, "dream", dream_strip(windows.frames[0][first:], {name: clip[first:] for name, clip in shown.items()}))
        logger.video(step, "dream", dream_video(windows.frames[0], shown, context=first), fps)
        errors = {name: (clips[name].float() - windows.frames.float())[:, first:].square().mean() for name in shown}
        keys = {TRUE_ACTIONS: "val_dream_psnr", SHUFFLED_ACTIONS: "val_dream_psnr_shuffled"}
        return {keys[name]: float(psnr_of_mse(float(error))) for name, error in errors.items()}

    return hook


def validate_imagination(phase: Phase3, batches: Sequence[Batch], seed: int) -> Hook:
    """Imagined return, KL to the prior and entropy, from held-out contexts. Imagined return alone is no evidence of skill."""

    @torch.no_grad()
    def hook(logger: RunLogger, step: int) -> dict[str, float]:
        device = phase.model.dynamics.device
        rows = []
        for index, batch in enumerate(batches):
            trajectory = phase.rollout(batch.to(device), step_generator(device, seed, "imagine", index))
            metrics = phase.score(trajectory)[1]
            rows.append({f"val_{name}": float(value) for name, value in metrics.items()})
        return _mean(rows)

    return hook


def all_of(*hooks: Hook) -> Hook:
    """One hook that runs several."""

    def hook(logger: RunLogger, step: int) -> dict[str, float]:
        return {name: value for part in hooks for name, value in part(logger, step).items()}

    return hook


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
