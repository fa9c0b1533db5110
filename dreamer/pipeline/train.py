"""The trainings of a run. Each function goes on where it stopped, and returns whether there was anything left to do."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamer.data import LatentStore, PretokenizedDataset, batches, frame_batches
from dreamer.data.files import locked
from dreamer.data.pretokenized_dataset import Ids
from dreamer.evaluation.open_loop import draw_windows
from dreamer.imagination import Sampler
from dreamer.models import Agent, CausalTokenizer, CosmosTokenizerWrapper, create_cosmos_tokenizer_from_config
from dreamer.pipeline.run import Run
from dreamer.training import validation
from dreamer.training.checkpoint import checkpoint_path, newest_checkpoint, planned_steps, read_state, save_checkpoint
from dreamer.training.distributed import Parallel
from dreamer.training.lengths import SequenceConfig
from dreamer.training.loop import Phase, Stream, TrainConfig, Trainer
from dreamer.training.models_io import agent_info, load_tokenizer, tokenizer_info, weights_fingerprint
from dreamer.training.phase0 import Phase0, Phase0Cosmos, make_perceptual
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import Phase2, Phase2Config, relevant_episodes
from dreamer.training.phase3 import Phase3
from dreamer.training.resume_checks import check_same_settings
from dreamer.types import Batch, Config, Tokenizer

NUM_VAL_FRAMES = 128
CLIPS_AT_ONCE = 8  # through Cosmos, while its projection is fitted
NUM_DREAMS = 4  # windows that are dreamed in a validation

_log = logging.getLogger(__name__)


def train_tokenizer(run: Run) -> bool:
    """Phase 0."""
    return _train_cosmos(run) if run.config.cosmos_tokenizer.enabled else _train_causal(run)


def _train_causal(run: Run) -> bool:
    config, data = run.config.phase0, _Frames(run)
    torch.manual_seed(run.seed("tokenizer"))
    channels, height, width = data.store.frame_shape
    tokenizer = CausalTokenizer(run.config.tokenizer, (channels, height, width)).to(run.device)
    phase = Phase0(tokenizer, config, data.normalization, make_perceptual(config, run.device)).to(run.device)
    own = _json(config)
    del own["cosmos"]  # decides nothing
    settings = {"phase0": own, "tokenizer": _json(run.config.tokenizer), "data": _data(run, data.store.fingerprint())}
    hook = validation.validate_tokenizer(phase, data.held_out())
    return _train(run, "tokenizer", phase, config.train, settings, tokenizer_info(tokenizer), data.stream, hook)


def _train_cosmos(run: Run) -> bool:
    """Takes the weights and fits the projection, where there is one, on training frames; then adapts them, if that is asked for."""
    config, path = run.config.phase0, run.path / "tokenizer"
    adapt, is_fitted = config.cosmos.adapt, run.config.cosmos_tokenizer.spatial_mode == "project"
    data = _Frames(run) if is_fitted or adapt != "none" else None
    settings = _cosmos_settings(run, data)
    if found := newest_checkpoint(path):  # it holds all that was there at first: the original weights may be gone
        state = read_state(found[1])
        check_same_settings(state["settings"] | {"seed": state["seed"]}, settings | {"seed": run.config.seed}, found[1])
        if found[0] >= run.config.tokenizer_steps and found[1] == checkpoint_path(path, found[0]):
            return False
        tokenizer = load_tokenizer(path, run.device)
        assert isinstance(tokenizer, CosmosTokenizerWrapper)  # by its settings
    else:
        tokenizer = create_cosmos_tokenizer_from_config(run.config.cosmos_tokenizer, run.device)
        if is_fitted and data is not None:
            clips = (clip for batch in data.normalization() for clip in batch.split(CLIPS_AT_ONCE))
            tokenizer.fit_projection(torch.cat([tokenizer.encode_positions(clip) for clip in clips]))
    info = tokenizer_info(tokenizer)
    if adapt == "none" or data is None:
        state = {"settings": settings, "seed": run.config.seed, "num_skipped": 0}
        run.begin()
        if run.ranks.is_main:
            made = info | run.made_with()
            with _alone(path, Parallel()):
                save_checkpoint(path, 0, model_tensors=tokenizer.state_dict(), model_info=made, train_tensors={}, state=state)
        return True
    phase = Phase0Cosmos(tokenizer, config, make_perceptual(config, run.device))
    held_out = data.held_out()
    hook = validation.all_of(validation.validate_tokenizer(phase, held_out), validation.validate_latent_scale(phase, held_out))
    return _train(run, "tokenizer", phase, config.train, settings, info, data.stream, hook)


def _cosmos_settings(run: Run, data: _Frames | None) -> dict[str, Any]:
    """All that decides how the tokenizer comes out; frames and phase 0's settings only where something learns from them."""
    settings = {"cosmos_tokenizer": _json(run.config.cosmos_tokenizer)}
    if data is not None:
        own = _json(run.config.phase0)
        del own["masking_ramp"]
        if run.config.phase0.cosmos.adapt == "none":
            own = {name: own[name] for name in ("cosmos", "num_frames", "normalization_frames")}
        settings |= {"phase0": own, "data": _data(run, data.store.fingerprint())}
    return settings


class _Frames:
    """Windows of the run's recorded frames, for phase 0."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.store = run, run.config.phase0, run.episodes()
        self.train_ids, self.val_ids = run.split(len(self.store))

    def stream(self, start: int) -> Stream:
        """Batches from the training episodes."""
        return frame_batches(
            self.store,
            batch_size=self.config.train.batch_size,
            num_frames=self.config.num_frames,
            episodes=self.train_ids,
            seed=self.run.seed("tokenizer"),
            start_step=start,
            num_workers=self.run.config.data.num_workers,
            rank=self.run.ranks.rank,
            world=self.run.ranks.world,
        )

    def normalization(self) -> Iterator[Tensor]:
        """Windows of the training episodes, the same every time."""
        return self._windows(self.train_ids, -(-self.config.normalization_frames // self.config.num_frames), "normalization")

    def held_out(self) -> Tensor:
        return torch.cat(list(self._windows(self.val_ids, max(1, NUM_VAL_FRAMES // self.config.num_frames), "validation")))

    def _windows(self, ids: Ids, count: int, purpose: str) -> Iterator[Tensor]:
        num_frames, seed = self.config.num_frames, self.run.seed(purpose)
        stream = frame_batches(self.store, batch_size=32, num_frames=num_frames, episodes=ids, seed=seed, prefetch=0)
        for _ in range(-(-count // 32)):
            yield next(stream).frames


def train_phase1(run: Run) -> bool:
    """Phase 1: the dynamics, from its initial weights."""
    config, tokenizer = run.config.phase1, run.own_tokenizer()
    latents = run.latents(tokenizer)
    torch.manual_seed(run.seed("phase1"))
    agent = Agent(
        run.config.agent,
        action_space=latents.action_space,
        token_grid=latents.token_grid,
        latent_channels=latents.latent_channels,
        actions_per_step=latents.actions_per_step,
    )
    phase = Phase1(agent, config.shortcut).to(run.device)
    warn_of_unseen_distances(run)
    data = _Data(run, latents, config.sequence_length)
    hook = validation.all_of(
        validation.validate_world_model(phase, data.held_out(config.train.batch_size), run.seed("validation")),
        *_dream_hooks(run, agent, tokenizer, latents),
    )
    settings = _settings(run, "phase1", config, latents)
    info = agent_info(agent, tokenizer_fingerprint=latents.tokenizer_fingerprint, phase="phase1")
    stream = data.stream("phase1", config.train.batch_size, lengths=config)
    return _train(run, "phase1", phase, config.train, settings, info, stream, hook)


def warn_of_unseen_distances(run: Run) -> None:
    """Once a process: rows shorter than the context never show the dynamics how far it will look back in a long dream."""
    config = run.config
    seen = config.agent.dynamics.transformer.context_length
    lengths = {"phase1": config.phase1.longest, "phase2": config.phase2.longest}
    if short := [f"{name}.sequence_length is {longest}" for name, longest in lengths.items() if longest < seen]:
        warnings.warn(
            f"{', '.join(short)}, but agent.dynamics.transformer.context_length is {seen}: dreams longer than the rows of training look "
            "back over distances that were never trained; set long_sequence_length above the context_length, or lower the context_length",
            stacklevel=1,  # this line, whoever calls: Python shows a warning once a line
        )


def train_phase2(run: Run) -> bool:
    """Phase 2, from phase 1's averaged weights."""
    config = run.config.phase2
    return _train_phase2(run, "phase2", "phase1", run.config.phase1.train.steps, config)


def train_bc_long(run: Run) -> bool:
    """The baseline of phase 3: phase 2 goes on from its averaged weights, for at least as many steps and as long as phase 3.

    At phase 2's full learning rates it would first undo what their fall has brought: it begins at a share of them, and they fall again.
    """
    config, scale = run.config.phase2, run.config.bc_long.learning_rate_scale
    optim = config.train.optim
    rates = {"learning_rate": optim.learning_rate * scale, "muon_learning_rate": optim.muon_learning_rate * scale, "decay_fraction": 1.0}
    train = config.train.model_copy(update={"steps": _extra_steps(run), "optim": optim.model_copy(update=rates)})
    return _train_phase2(run, "bc_long", "phase2", config.train.steps, config.model_copy(update={"train": train}))


def _extra_steps(run: Run) -> int:
    if run.config.bc_long.extra_steps is not None:
        return run.config.bc_long.extra_steps
    if found := newest_checkpoint(run.path / "bc_long"):  # already begun: measuring again could give another number
        return planned_steps(found[1], "bc_long")
    run.require_finished("phase3", run.config.phase3.train.steps)
    seconds_a_step = run.seconds("phase2") / run.config.phase2.train.steps
    return max(run.config.phase3.train.steps, math.ceil(run.seconds("phase3") / seconds_a_step))


def _train_phase2(run: Run, name: str, start: str, start_steps: int, config: Phase2Config) -> bool:
    latents = run.latents(run.own_tokenizer())
    agent = run.agent(start, latents.tokenizer_fingerprint, start_steps)
    phase = Phase2(agent, config.shortcut, config.loss).to(run.device)
    warn_of_unseen_distances(run)
    data = _Data(run, latents, config.sequence_length)
    returns = episode_returns(latents)
    relevant = relevant_episodes(returns, latents.has_rewards, np.asarray(data.train_ids), config.relevant)
    held_out = data.held_out(config.train.batch_size)
    hook = validation.all_of(
        validation.validate_world_model(phase, held_out, run.seed("validation")),
        validation.validate_heads(phase, data.held_out(config.train.batch_size, returns, config), run.seed("validation")),
    )
    settings = _settings(run, name, config, latents, weights_fingerprint(run.path / start))
    info = agent_info(agent, tokenizer_fingerprint=latents.tokenizer_fingerprint, phase=name)
    stream = data.stream(name, config.train.batch_size, config.relevant.fraction, relevant, lengths=config)
    return _train(run, name, phase, config.train, settings, info, stream, hook)


def train_phase3(run: Run) -> bool:
    """Phase 3: policy and value in imagination, from phase 2's averaged weights."""
    config, latents = run.config.phase3, run.latents(run.own_tokenizer())
    agent = run.agent("phase2", latents.tokenizer_fingerprint, run.config.phase2.train.steps)
    phase = Phase3(agent, config.imagination).to(run.device)
    data = _Data(run, latents, config.imagination.rollout.context)
    if not knows_rewards(run):
        raise ValueError(
            f"{latents.path}: no episode's rewards are known, so there is nothing to practise for; phase 3 needs some that are"
        )
    hook = validation.validate_imagination(phase, data.held_out(config.train.batch_size), run.seed("validation"))
    settings = _settings(run, "phase3", config, latents, weights_fingerprint(run.path / "phase2"))
    info = agent_info(agent, tokenizer_fingerprint=latents.tokenizer_fingerprint, phase="phase3")
    return _train(run, "phase3", phase, config.train, settings, info, data.stream("phase3", config.train.batch_size), hook)


def knows_rewards(run: Run) -> bool:
    """Whether the rewards of any training episode are known: without, nothing can be practised for."""
    latents = run.latents(None)
    return bool(latents.has_rewards[run.split(len(latents))[0]].any())


def episode_returns(latents: LatentStore) -> Float[np.ndarray, " n"]:
    """The sum of each episode's rewards."""
    return np.array([latents.arrays(i)["rewards"].sum(dtype=np.float64) for i in range(len(latents))])


class _Data:
    """Windows of the run's latents: streams for training, fixed batches for validation."""

    def __init__(self, run: Run, latents: LatentStore, sequence_length: int) -> None:
        self.run, self.latents, self.sequence_length = run, latents, sequence_length
        self.train_ids, self.val_ids = run.split(len(latents))
        first, last, num_tasks = int(latents.tasks.min()), int(latents.tasks.max()), run.config.agent.dynamics.num_tasks
        if first < 0 or last >= num_tasks:
            raise ValueError(
                f"{latents.path}: its episodes are of tasks {first} to {last}; "
                f"agent.dynamics.num_tasks is {num_tasks}: expected 0 to {num_tasks - 1}"
            )

    def stream(
        self,
        name: str,
        batch_size: int,
        relevant_fraction: float = 0.0,
        relevant: Ids | None = None,
        lengths: SequenceConfig | None = None,
    ) -> Callable[[int], Stream]:
        """Batches from the training episodes; ``lengths``: with its long rows."""
        dataset = PretokenizedDataset(self.latents, self.sequence_length, self.train_ids)
        long, long_every = None, 1
        if lengths is not None and lengths.long_sequence_length is not None:
            long, long_every = PretokenizedDataset(self.latents, lengths.long_sequence_length, self.train_ids), lengths.long_every
        return lambda start: batches(
            dataset,
            batch_size=batch_size,
            seed=self.run.seed(name),
            start_step=start,
            relevant_fraction=relevant_fraction,
            relevant_episodes=relevant,
            long=long,
            long_every=long_every,
            num_workers=self.run.config.data.num_workers,
            rank=self.run.ranks.rank,
            world=self.run.ranks.world,
        )

    def held_out(self, batch_size: int, returns: np.ndarray | None = None, config: Phase2Config | None = None) -> list[Batch]:
        """The same batches every time. With ``returns``: rows of relevant episodes alone."""
        ids, fraction = self.val_ids, 0.0
        if returns is not None and config is not None:
            ids, fraction = relevant_episodes(returns, self.latents.has_rewards, np.asarray(ids), config.relevant), 1.0
        dataset = PretokenizedDataset(self.latents, self.sequence_length, ids)
        stream = batches(
            dataset, batch_size=batch_size, seed=self.run.seed("validation"), relevant_fraction=fraction, relevant_episodes=ids, prefetch=0
        )
        return [next(stream) for _ in range(self.run.config.data.num_val_batches)]


def _dream_hooks(run: Run, agent: Agent, tokenizer: Tokenizer | None, latents: LatentStore) -> list[validation.Hook]:
    """Pictures of dreams; none where there is nothing to decode them with, or no frames to compare them with."""
    if tokenizer is None or not run.has_episodes:
        _log.warning("phase1: no pictures of dreams: data.latents come without the recorded frames")
        return []
    if not tokenizer.can_decode:
        _log.warning("phase1: no pictures of dreams: these latents cannot be decoded (cosmos_tokenizer.spatial_mode mean)")
        return []
    config, store = run.config.evaluation, run.episodes()
    windows = draw_windows(
        store,
        latents,
        run.split(len(latents))[1],
        tokenizer=tokenizer,
        num_steps=config.world_model.context + config.world_model.horizon,
        num_windows=NUM_DREAMS,
        seed=run.seed("dreams"),
    )
    sampler = Sampler(agent.dynamics, config.sampler)
    context, seed = config.world_model.context, run.seed("dreams")
    return [validation.validate_dreams(agent, sampler, tokenizer, windows, context=context, fps=store.fps, seed=seed)]


def _json(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _data(run: Run, fingerprint: str) -> dict[str, Any]:
    return {"fingerprint": fingerprint, "val_fraction": run.config.data.val_fraction}


def _settings(run: Run, name: str, config: Config, latents: LatentStore, start: str | None = None) -> dict[str, Any]:
    """All that decides how the weights of a phase come out: a run is resumed with the same, or not at all."""
    data = _data(run, latents.source_fingerprint) | {"tokenizer": latents.tokenizer_fingerprint}
    own = _json(config)
    if isinstance(config, SequenceConfig) and config.long_sequence_length is None:
        del own["long_every"]  # decides nothing
    return {name: own, "agent": _json(run.config.agent), "data": data, "initial_weights": start}


def _train(
    run: Run,
    name: str,
    phase: Phase,
    config: TrainConfig,
    settings: dict[str, Any],
    info: dict[str, Any],
    stream: Callable[[int], Stream],
    hook: validation.Hook,
) -> bool:
    parallel, made = Parallel(run.ranks, run.config.parallel.strategy), info | run.made_with()
    with _alone(run.path / name, parallel):  # from the start: resuming sets damaged checkpoints aside
        trainer = Trainer(phase, config, run.path / name, seed=run.config.seed, settings=settings, model_info=made, parallel=parallel)
        if trainer.is_finished:
            return False
        run.begin()
        trainer.run(stream, hook)
    return True


@contextmanager
def _alone(folder: Path, parallel: Parallel) -> Iterator[None]:
    """No other training in ``folder``, where each would remove what the other writes. Raises ``ValueError`` if there is one."""
    with ExitStack() as held:
        parallel.main_does(lambda: held.enter_context(locked(folder)))
        yield
