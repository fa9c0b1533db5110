"""``dreamer check``: shapes, x-prediction and gradient flow, proved on what a run holds, else on fresh models of its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreamer.data import LatentStore, PretokenizedDataset, batches, num_latent_steps
from dreamer.models import ActionDistribution, Agent, CausalTokenizer, CosmosTokenizerWrapper
from dreamer.models.cosmos_weights import build_network
from dreamer.pipeline.dry_run import Inputs, find_inputs
from dreamer.pipeline.run import Run
from dreamer.pipeline.train import episode_returns
from dreamer.training.checkpoint import newest_checkpoint
from dreamer.training.models_io import AnyTokenizer, load_tokenizer
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import Phase2, relevant_episodes
from dreamer.training.phase3 import Phase3
from dreamer.types import Batch
from dreamer.utils.debug_phase1 import verify_x_prediction
from dreamer.utils.gradient_flow import HEADER, gradient_flow

NUM_ROWS = 16  # windows of a batch, half of them relevant: enough that no head is left without rows by chance


@dataclass(frozen=True)
class Section:
    title: str
    lines: tuple[str, ...]  # as they are printed
    num_checks: int
    failures: tuple[str, ...]

    @classmethod
    def of(cls, title: str, checks: list[tuple[str, bool]], before: tuple[str, ...] = ()) -> Section:
        """``checks``: what is claimed, and whether it holds."""
        lines = [f"  {'ok   ' if holds else 'FAILS'}  {claim}" for claim, holds in checks]
        return cls(title, (*before, *lines), len(checks), tuple(claim for claim, holds in checks if not holds))


@dataclass(frozen=True)
class CheckReport:
    sources: tuple[str, ...]  # what was checked
    sections: tuple[Section, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(f"{section.title}: {failure}" for section in self.sections for failure in section.failures)

    def text(self) -> str:
        lines = list(self.sources)
        for section in self.sections:
            lines += ["", section.title, *section.lines]
        total = sum(section.num_checks for section in self.sections)
        verdict = f"{len(self.failures)} of {total} checks FAIL" if self.failures else f"all {total} checks hold"
        return "\n".join([*lines, "", verdict, *(f"  {failure}" for failure in self.failures)])


@dataclass(frozen=True)
class _Subject:
    """What is checked. ``latents``: None where batches are made up."""

    tokenizer: AnyTokenizer | None
    latents: LatentStore | None
    agent: Agent
    is_trained: bool  # the agent's weights come from a checkpoint
    batch: Callable[[int], Batch]  # of windows of so many latent steps
    sources: tuple[str, ...]


def check_run(run: Run) -> CheckReport:
    """Check the run's newest tokenizer and agent on its latents. What is not there yet is made fresh; nothing is written.

    Raises ``ValueError`` for data that are damaged, unfinished or belong to other models, and if nothing tells the action space.
    """
    subject = _find(run)
    sections = [_shapes(run, subject), _x_prediction(run, subject)]
    agent, config = subject.agent, run.config
    makers: dict[str, tuple[Callable[[], Phase1 | Phase2 | Phase3], int]] = {
        "phase1": (lambda: Phase1(agent, config.phase1.shortcut), config.phase1.sequence_length),
        "phase2": (lambda: Phase2(agent, config.phase2.shortcut, config.phase2.loss), config.phase2.sequence_length),
        "phase3": (lambda: Phase3(agent, config.phase3.imagination), config.phase3.imagination.rollout.context),
    }
    for name, (make, length) in makers.items():
        title = f"gradient flow in {name}, one backward pass of {NUM_ROWS} windows of {length} latent steps"
        if name == "phase3" and subject.latents is not None and not _rewards_known(run, subject.latents):
            sections.append(
                Section(title, ("  left out: no episode's rewards are known, so that there is nothing to practise for",), 0, ())
            )
            continue
        flows = gradient_flow(make().to(run.device), subject.batch(length), tokenizer=subject.tokenizer, seed=run.seed("check"))
        failures = tuple(f"{flow.part} {flow.problem}" for flow in flows if flow.problem)
        sections.append(Section(title, (HEADER, *(flow.row() for flow in flows)), len(flows), failures))
    return CheckReport(subject.sources, tuple(sections))


# ---- what there is --------------------------------------------------------------------------------------------------------------


def _find(run: Run) -> _Subject:
    has_tokenizer = newest_checkpoint(run.path / "tokenizer") is not None
    tokenizer = load_tokenizer(run.path / "tokenizer", run.device) if has_tokenizer else None
    told = f"tokenizer  {run.path / 'tokenizer'}"
    trained = [phase for phase in ("phase3", "phase2", "phase1") if newest_checkpoint(run.path / phase)]
    latents, inputs = None, None
    if run.latents_path.is_dir() or not run.has_episodes or trained:  # what was trained is never passed over
        latents = run.latents(tokenizer)
    else:
        inputs = find_inputs(run)
    if tokenizer is None:
        tokenizer = _fresh_tokenizer(run, inputs)
        told = "tokenizer  " + ("fresh, with random weights" if tokenizer else "none: the latents come without theirs")
    sources = [told]
    if latents is None:
        assert inputs is not None
        agent = _fresh_agent(run, inputs)
        sources += [f"latents    made up: {run.latents_path} does not exist; {inputs.sources}"]
    else:
        agent = run.agent(trained[0], latents.tokenizer_fingerprint) if trained else _fresh_agent(run, latents)
        sources += [f"latents    {latents.path}, {len(latents)} episodes with {latents.lengths.sum()} latent steps"]
    sources.append(f"agent      {run.path / trained[0]}" if trained else "agent      fresh, with random weights")

    def batch(length: int) -> Batch:
        return _made_up_batch(run, agent, length) if latents is None else _recorded_batch(run, latents, length)

    return _Subject(tokenizer, latents, agent, bool(trained), batch, tuple(sources))


def _fresh_tokenizer(run: Run, inputs: Inputs | None) -> AnyTokenizer | None:
    """As the settings say; None where they are silent. Cosmos' own weights are not needed: shapes do not depend on them."""
    cosmos = run.config.cosmos_tokenizer
    torch.manual_seed(run.seed("tokenizer"))
    if not cosmos.enabled:
        made = CausalTokenizer(run.config.tokenizer, inputs.frame_shape) if inputs is not None else None
        return made.to(run.device).requires_grad_(False).eval() if made is not None else None
    tokenizer = CosmosTokenizerWrapper(cosmos, build_network({}))
    if tokenizer.projection is not None:
        num_clips = cosmos.latent_dim // cosmos.num_tokens + 1
        tokenizer.fit_projection(torch.randn(num_clips, tokenizer.num_network_channels, 1, *tokenizer.position_grid))
    return tokenizer.to(run.device)


def _fresh_agent(run: Run, sizes: LatentStore | Inputs) -> Agent:
    torch.manual_seed(run.seed("phase1"))
    agent = Agent(
        run.config.agent,
        action_space=sizes.action_space,
        token_grid=sizes.token_grid,
        latent_channels=sizes.latent_channels,
        actions_per_step=sizes.actions_per_step,
    )
    return agent.to(run.device)


def _recorded_batch(run: Run, latents: LatentStore, length: int) -> Batch:
    """Windows of the training episodes, the first half from relevant ones."""
    train_ids, _ = run.split(len(latents))
    relevant = relevant_episodes(episode_returns(latents), latents.has_rewards, np.asarray(train_ids), run.config.phase2.relevant)
    stream = batches(
        PretokenizedDataset(latents, length, train_ids),
        batch_size=NUM_ROWS,
        seed=run.seed("check"),
        relevant_fraction=0.5,
        relevant_episodes=relevant,
        prefetch=0,
    )
    return next(stream)


def _rewards_known(run: Run, latents: LatentStore) -> bool:
    return bool(latents.has_rewards[run.split(len(latents))[0]].any())


def _made_up_batch(run: Run, agent: Agent, length: int) -> Batch:
    """Noise for latents, and actions, rewards and ends by chance."""
    generator, dynamics = torch.Generator().manual_seed(run.seed("check")), agent.dynamics
    shape = (NUM_ROWS, length, dynamics.actions_per_step)
    flat = torch.zeros(*shape, ActionDistribution.num_parameters(agent.action_space))
    actions, known = ActionDistribution(agent.action_space, flat).sample(generator), torch.ones(shape, dtype=torch.bool)
    return Batch(
        latents=torch.randn(NUM_ROWS, length, dynamics.num_spatial, dynamics.latent_channels, generator=generator),
        prev_actions=actions,
        prev_action_mask=known,
        actions=actions,
        action_mask=known,
        rewards=torch.rand(shape[:2], generator=generator),
        terminals=torch.zeros(shape[:2], dtype=torch.bool),
        task=torch.zeros(NUM_ROWS, dtype=torch.long),
        has_rewards=torch.ones(NUM_ROWS, dtype=torch.bool),
        is_relevant=torch.arange(NUM_ROWS) < NUM_ROWS // 2,
    )


# ---- the checks -----------------------------------------------------------------------------------------------------------------


def _shapes(run: Run, subject: _Subject) -> Section:
    checks: list[tuple[str, bool]] = []
    tokenizer, latents, dynamics = subject.tokenizer, subject.latents, subject.agent.dynamics
    sizes = (dynamics.num_spatial, dynamics.latent_channels)
    if tokenizer is not None:
        stride = tokenizer.temporal_stride
        for num_frames in (1, stride + 2):  # a whole step, and one that has to be filled up
            expected = (1, num_latent_steps(num_frames, stride), *sizes)
            shape = tuple(tokenizer.encode(_frames(run, tokenizer, num_frames)).shape)
            claim = f"F = {num_frames} frames are encoded as (B, T, N, Z) = {shape}"
            checks.append((f"{claim}; expected {expected}: T = 1 + ceil((F - 1) / {stride}), N and Z of the dynamics", shape == expected))
        claim = f"actions of a latent step: {dynamics.actions_per_step}; expected 1, or one for each of its frames: {stride}"
        checks.append((claim, dynamics.actions_per_step in (1, stride)))
        if isinstance(tokenizer, CosmosTokenizerWrapper):
            tokenizer.train()
            checks.append(("the tokenizer stays in eval mode after .train()", not any(m.training for m in tokenizer.modules())))
    if latents is not None:
        store = (latents.token_grid[0] * latents.token_grid[1], latents.latent_channels)
        checks.append((f"stored latents have N Z = {store}, as the dynamics takes them: {sizes}", store == sizes))
        if run.has_episodes:
            steps = [num_latent_steps(int(n), latents.temporal_stride) for n in run.episodes().lengths]
            claim = f"each episode of F frames has 1 + ceil((F - 1) / {latents.temporal_stride}) latent steps, {sum(steps)} in all"
            checks.append((claim, latents.lengths.tolist() == steps))
    return Section.of("shapes", checks)


def _frames(run: Run, tokenizer: AnyTokenizer, num_frames: int) -> Tensor:
    """The first frames of a recording that has as many; without one, noise."""
    if run.has_episodes and run.episodes_path.is_dir():
        store = run.episodes()
        if len(long := np.flatnonzero(store.lengths >= num_frames)):
            return torch.from_numpy(store.frames(int(long[0]), 0, num_frames))[None]
    generator = torch.Generator().manual_seed(run.seed("check"))
    return torch.randint(0, 256, (1, num_frames, *tokenizer.frame_shape), generator=generator, dtype=torch.uint8)


def _x_prediction(run: Run, subject: _Subject) -> Section:
    report = verify_x_prediction(subject.agent.eval(), subject.batch(run.config.phase1.sequence_length), seed=run.seed("check"))
    off = f"off by {report.target_error:.1e} deviations, larger steps by {report.bootstrap_error:.1e}"
    checks = [(f"the loss asks for clean latents, {off}", report.trains_x_prediction)]
    if subject.is_trained:  # a fresh model puts out nothing in particular
        hint = "; it has learned too little to tell: train it longer" if report.reads_as == "nothing clear" else ""
        checks.append((f"the output reads as {report.reads_as}; expected clean latents{hint}", report.reads_as == "clean latents"))
    return Section.of("x-prediction", checks, tuple(f"  {line}" for line in report.text().splitlines()))
