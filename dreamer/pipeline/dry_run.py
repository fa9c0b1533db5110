"""What training one part would take, before anything is trained: shapes, parameters, FLOPs, memory, and which cards it fits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamer.config import DreamerConfig
from dreamer.data import READERS, EpisodeStore, LatentStore, make_reader
from dreamer.data.actions import env_codec
from dreamer.data.pretokenized_dataset import long_batch_size, most_rows
from dreamer.data.shards import STORE_FILE
from dreamer.envs import make_env
from dreamer.models import Agent, CausalTokenizer, CosmosTokenizerWrapper
from dreamer.models.cosmos_weights import build_network
from dreamer.pipeline.run import Run
from dreamer.pipeline.step_cost import StepCost, in_one_of_several, num_bytes, simulate_step
from dreamer.training.checkpoint import newest_checkpoint
from dreamer.training.distributed import Ranks
from dreamer.training.lengths import SequenceConfig
from dreamer.training.loop import Phase, TrainConfig
from dreamer.training.optim import MUON_CANNOT
from dreamer.training.phase0 import Phase0, Phase0Cosmos
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import Phase2
from dreamer.training.phase3 import Phase3
from dreamer.types import ActionSpace, Batch, FrameBatch

CARDS = (8, 12, 24, 80)  # GB of 10^9 bytes; cards hold some more
MARGIN, FIXED_MARGIN = 0.1, 1e9  # for what PyTorch's allocator cannot use, and for CUDA itself with its libraries


@dataclass(frozen=True)
class Inputs:
    """What the models are built for, and where that is known from."""

    action_space: ActionSpace
    token_grid: tuple[int, int]
    latent_channels: int
    actions_per_step: int
    frame_shape: tuple[int, int, int]  # C, H, W
    tokenizer: CausalTokenizer | CosmosTokenizerWrapper  # its weights have no content
    sources: str


@dataclass(frozen=True)
class Step:
    """A kind of training step: its name, the share of all steps that are so, one of its batches, and what else it depends on."""

    name: str
    share: float
    batch: Callable[[], Batch | FrameBatch]
    number: int = 0
    num_uniform_rows: int = 0  # rows that are not drawn as relevant ones
    carried: Callable[[], dict[str, Tensor]] = dict  # what the phase carries over from the step before


@dataclass(frozen=True)
class Plan:
    """What a part trains: the phase, how, and on what."""

    build: Callable[[], Phase]
    train: TrainConfig
    steps: tuple[Step, ...]


def dry_run(config: DreamerConfig, part: str, processes: int | None = None) -> str:
    """A page of text on ``dreamer train part``. Nothing is trained, written or kept in memory, and no data have to be there.

    FLOPs and memory are those of one of ``processes`` (None: as many as torchrun has started).

    The action space comes from the run's latents or episodes, else from the reader of its recordings, else from the environment.
    Raises ``ValueError`` if none of them tells, for an unknown part, and if the processes could not train it.
    """
    processes = Ranks.from_environment().world if processes is None else processes
    if processes < 1:
        raise ValueError(f"{processes} processes; expected at least 1")
    run = Run(config.model_copy(update={"device": "cpu", "threads": None}))
    inputs = find_inputs(run)
    if part == "tokenizer" and not config.tokenizer_steps:
        return _nothing_to_train(config, inputs)
    plan = make_plan(config, part, inputs, processes)
    strategy = config.parallel.strategy
    if processes > 1 and strategy == "fsdp" and plan.train.optim.optimizer == "muon":
        raise ValueError(MUON_CANNOT)
    costs = [
        simulate_step(plan.build, s.batch, plan.train, step=s.number, whole_number=s.num_uniform_rows, carried=s.carried)
        for s in plan.steps
    ]
    with torch.device("meta"):
        phase = plan.build()
    costs = [in_one_of_several(cost, phase, processes, strategy) for cost in costs]
    has_tokenizer = run.has_episodes or newest_checkpoint(run.path / "tokenizer") is not None  # data.latents need none
    tokenizer = inputs.tokenizer if part != "tokenizer" and has_tokenizer else None
    return "\n".join(
        [
            f"dry run of {part}, {plan.train.steps} steps in {plan.train.precision}"
            + (f", in each of {processes} processes ({strategy})" if processes > 1 else ""),
            *_inputs_text(inputs, plan),
            *_parameters_text(count_parameters(phase, tokenizer)),
            *_flops_text(plan, costs),
            *_memory_text(costs, frozen_bytes(tokenizer), plan.train.activation_checkpointing),
        ]
    )


# ---- inputs ---------------------------------------------------------------------------------------------------------------------


def find_inputs(run: Run) -> Inputs:
    """Shapes and actions from the latents, where there are some, else from the tokenizer's settings and the recordings."""
    cosmos = run.config.cosmos_tokenizer
    latents = LatentStore(run.latents_path, allow_partial=True) if (run.latents_path / STORE_FILE).exists() else None
    if latents is not None:
        latents.check_actions(run.config.data.actions)
    if not run.has_episodes:  # what training would refuse
        run.require_foreign_latents()
        if latents is not None:
            run.check_settings(latents)
    if latents is not None and cosmos.enabled:
        space, frame_shape, source = latents.action_space, (3, *cosmos.frame_size), ""
    else:
        space, frame_shape, source = _recordings(run)
    with torch.device("meta"):
        network: Any = build_network({}) if cosmos.enabled else CausalTokenizer(run.config.tokenizer, frame_shape)
    tokenizer: CausalTokenizer | CosmosTokenizerWrapper = CosmosTokenizerWrapper(cosmos, network) if cosmos.enabled else network
    if latents is not None:
        return Inputs(
            latents.action_space,
            latents.token_grid,
            latents.latent_channels,
            latents.actions_per_step,
            frame_shape,
            tokenizer,
            f"latents and actions as in {run.latents_path}",
        )
    told = f"latents as {'cosmos_tokenizer' if cosmos.enabled else 'tokenizer'} says, actions as in {source}"
    num_actions = 1 if run.config.data.actions == "linspace" else tokenizer.temporal_stride
    return Inputs(space, tokenizer.token_grid, tokenizer.latent_channels, num_actions, frame_shape, tokenizer, told)


def _recordings(run: Run) -> tuple[ActionSpace, tuple[int, int, int], str]:
    """Action space and frame shape of the episodes, of the recordings that will be imported, or of the environment that will be played."""
    recordings, env, cosmos = run.config.data.recordings, run.config.env, run.config.cosmos_tokenizer
    if (run.episodes_path / STORE_FILE).exists() or (recordings is not None and recordings.reader == "store"):
        store = EpisodeStore(run.episodes_path)
        channels, height, width = store.frame_shape
        return store.action_space, (channels, height, width), str(run.episodes_path)
    if recordings is not None:
        name, path = recordings.reader, recordings.path
        # a format that has one action space needs no files; the others say what they miss
        make = READERS[name] if name in READERS and not path.exists() else functools.partial(make_reader, name)
        try:
            reader = make(path, **recordings.options)
        except ValueError as error:
            if path.exists() or "action_space" not in inspect.signature(make).parameters:
                raise
            hint = "a dry run before they are there needs data.recordings.options.action_space, such as minerl"
            raise ValueError(f"{error}; {hint}") from error
        size = cosmos.frame_size if cosmos.enabled else getattr(reader, "size", None)
        height, width = size or reader.read(reader.find(path)[0]).frames.shape[2:]
        return reader.action_space, (3, height, width), f"recordings of the format {name}"
    if env is None:
        raise ValueError(f"{run.episodes_path}: no episodes here, and no data.recordings or env are set that would tell the frames' size")
    made = make_env(env.name, **env.options)
    space, (height, width, channels) = env_codec(made).space, made.observation_space.sample().shape
    made.close()
    return space, (channels, height, width), f"the environment {env.name}"


# ---- what is trained ------------------------------------------------------------------------------------------------------------


def make_plan(config: DreamerConfig, part: str, inputs: Inputs, processes: int = 1) -> Plan:
    """The phase that ``part`` trains, with its kinds of steps: the rows are those of the process that has most of them."""

    def agent() -> Agent:
        return Agent(
            config.agent,
            action_space=inputs.action_space,
            token_grid=inputs.token_grid,
            latent_channels=inputs.latent_channels,
            actions_per_step=inputs.actions_per_step,
        )

    if part == "tokenizer":
        shape = (most_rows(config.phase0.train.batch_size, processes), config.phase0.num_frames, *inputs.frame_shape)
        batch = Step("batch", 1.0, lambda: FrameBatch(torch.zeros(shape, dtype=torch.uint8)))
        return Plan(lambda: _phase0(config, inputs), config.phase0.train, (batch,))
    if part == "phase1":
        phase1 = config.phase1
        return Plan(lambda: Phase1(agent(), phase1.shortcut), phase1.train, _steps(inputs, phase1, phase1.train.batch_size, processes))
    if part in ("phase2", "bc_long"):
        phase2 = config.phase2
        steps = _steps(inputs, phase2, phase2.train.batch_size, processes, phase2.relevant.fraction)
        return Plan(lambda: Phase2(agent(), phase2.shortcut, phase2.loss), phase2.train, steps)
    if part == "phase3":
        phase3 = config.phase3.imagination
        every = phase3.updates_per_rollout
        dreaming = -(-phase3.value_only_steps // every) * every  # a step that dreams anew, late enough that the policy learns too
        rows = most_rows(config.phase3.train.batch_size, processes)
        batch, before = _batch(inputs, rows, phase3.rollout.context), _imagined(inputs, config, rows)
        steps = [Step(f"batch from which {phase3.rollout.horizon} steps are imagined", 1 / every, batch, dreaming, carried=before)]
        if every > 1:
            name = "batch that is not read: what was imagined before serves again"
            steps.append(Step(name, 1 - 1 / every, batch, dreaming + 1, carried=before))
        return Plan(lambda: Phase3(agent(), phase3), config.phase3.train, tuple(steps))
    raise ValueError(f"no part is called {part!r}; expected tokenizer, phase1, phase2, bc_long or phase3")


def _phase0(config: DreamerConfig, inputs: Inputs) -> Phase0 | Phase0Cosmos:
    """Without the perceptual loss, whose weights may not be here."""
    if not config.cosmos_tokenizer.enabled:
        return Phase0(CausalTokenizer(config.tokenizer, inputs.frame_shape), config.phase0, lambda: ())
    network = build_network({})
    with torch.device("cpu"):  # it looks at the values of its statistics
        tokenizer = CosmosTokenizerWrapper(config.cosmos_tokenizer, network)
    return Phase0Cosmos(tokenizer, config.phase0)


def _steps(inputs: Inputs, config: SequenceConfig, batch_size: int, processes: int, relevant_fraction: float = 0.0) -> tuple[Step, ...]:
    """Steps on short rows, and those on long ones, where there are such."""

    def step(name: str, share: float, rows: int, length: int) -> Step:
        own = most_rows(rows, processes, f"a {name}")
        num_relevant = round(relevant_fraction * own)
        return Step(name, share, _batch(inputs, own, length), num_uniform_rows=own - num_relevant or own)

    short, long = config.sequence_length, config.long_sequence_length
    if long is None:
        return (step("batch", 1.0, batch_size, short),)
    some = step("batch of long rows", 1 / config.long_every, long_batch_size(batch_size, short, long), long)
    return (step("batch", 1 - some.share, batch_size, short), some) if some.share < 1 else (some,)


def _batch(inputs: Inputs, rows: int, length: int) -> Callable[[], Batch]:
    actions = (rows, length, inputs.actions_per_step)

    def make() -> Batch:
        return Batch(
            latents=torch.zeros(rows, length, inputs.token_grid[0] * inputs.token_grid[1], inputs.latent_channels),
            prev_actions=torch.zeros(*actions, inputs.action_space.num_columns),
            prev_action_mask=torch.zeros(actions, dtype=torch.bool),
            actions=torch.zeros(*actions, inputs.action_space.num_columns),
            action_mask=torch.zeros(actions, dtype=torch.bool),
            rewards=torch.zeros(rows, length),
            terminals=torch.zeros(rows, length, dtype=torch.bool),
            task=torch.zeros(rows, dtype=torch.long),
            has_rewards=torch.zeros(rows, dtype=torch.bool),
            is_relevant=torch.zeros(rows, dtype=torch.bool),
        )

    return make


def _imagined(inputs: Inputs, config: DreamerConfig, rows: int) -> Callable[[], dict[str, Tensor]]:
    """A ``Trajectory`` as phase 3 carries it."""
    horizon, width = config.phase3.imagination.rollout.horizon, config.agent.dynamics.transformer.width

    def make() -> dict[str, Tensor]:
        return {
            "features": torch.zeros(rows, horizon + 1, width),
            "actions": torch.zeros(rows, horizon, inputs.actions_per_step, inputs.action_space.num_columns),
            "rewards": torch.zeros(rows, horizon),
            "continues": torch.zeros(rows, horizon),
            "latents": torch.zeros(rows, horizon + 1, inputs.token_grid[0] * inputs.token_grid[1], inputs.latent_channels),
            "has_ended": torch.zeros(rows, dtype=torch.bool),
        }

    return make


def count_parameters(phase: Phase, tokenizer: nn.Module | None) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters of each part. ``tokenizer``: one that is in memory beside the phase, frozen."""
    counts: dict[str, tuple[int, int]] = {}

    def add(part: str, parameter: Tensor, is_trainable: bool) -> None:
        trainable, frozen = counts.get(part, (0, 0))
        counts[part] = (trainable + parameter.numel() * is_trainable, frozen + parameter.numel() * (not is_trainable))

    for parameter in tokenizer.parameters() if tokenizer is not None else ():
        add("tokenizer", parameter, False)
    for name, parameter in phase.named_parameters():
        owner, part, *_ = name.split(".")
        if not isinstance(phase.model, Agent):
            part = "tokenizer"
        elif owner == "model":
            part = "dynamics" if part == "dynamics" else "heads"
        else:
            part = "prior policy"
        add(part, parameter, parameter.requires_grad)
    return counts


def frozen_bytes(tokenizer: nn.Module | None) -> int:
    """Memory of a tokenizer that is there to decode; Cosmos computes in bf16 on a GPU."""
    if isinstance(tokenizer, CosmosTokenizerWrapper):
        return 2 * sum(p.numel() for p in tokenizer.parameters())
    return num_bytes(tokenizer.state_dict().values()) if tokenizer is not None else 0


# ---- in words -------------------------------------------------------------------------------------------------------------------


def _nothing_to_train(config: DreamerConfig, inputs: Inputs) -> str:
    frozen = sum(p.numel() for p in inputs.tokenizer.parameters())
    lines = [
        "dry run of tokenizer: there is nothing to train",
        f"phase0.cosmos.adapt is none: the {frozen:,} parameters of the Cosmos tokenizer stay as they are",
    ]
    if config.cosmos_tokenizer.spatial_mode == "project":
        lines.append(f"its projection is fitted to {config.phase0.normalization_frames:,} frames, which go through the encoder once")
    remedy = "phase0.cosmos.adapt=decoder (or all)"
    if config.cosmos_tokenizer.spatial_mode == "mean":
        remedy += " with cosmos_tokenizer.spatial_mode project or none; what mean keeps cannot be decoded"
    return "\n".join([*lines, f"to adapt it to the frames: {remedy}"])


def _inputs_text(inputs: Inputs, plan: Plan) -> list[str]:
    lines = [inputs.sources]
    for step in plan.steps:
        with torch.device("meta"):
            batch = step.batch()
        lines += ["", step.name + (f" ({step.share:.1%} of the steps)" if len(plan.steps) > 1 else "")]
        for name in ("frames",) if isinstance(batch, FrameBatch) else ("latents", "prev_actions", "actions", "rewards"):
            tensor = getattr(batch, name)
            lines.append(f"  {name:<16}{tuple(tensor.shape)!s:<26}{str(tensor.dtype).removeprefix('torch.')}")
    return lines


def _parameters_text(counts: dict[str, tuple[int, int]]) -> list[str]:
    total = (sum(trainable for trainable, _ in counts.values()), sum(frozen for _, frozen in counts.values()))
    rows = [f"  {part:<16}{trainable:>16,}{frozen:>16,}" for part, (trainable, frozen) in (counts | {"all": total}).items()]
    return ["", f"{'parameters':<18}{'trainable':>16}{'frozen':>16}", *rows]


def _flops_text(plan: Plan, costs: list[StepCost]) -> list[str]:
    mean = sum(step.share * cost.flops for step, cost in zip(plan.steps, costs, strict=True))
    batches = f", {plan.train.accumulate} batches" if plan.train.accumulate > 1 else ""
    return [
        "",
        f"{'FLOPs of a step':<18}{mean / 1e12:>16.4g} TFLOP (forward, backward, optimiser{batches})",
        f"{'of all steps':<18}{mean * plan.train.steps / 1e15:>16.4g} PFLOP",
    ]


def _memory_text(costs: list[StepCost], tokenizer_bytes: int, is_checkpointed: bool) -> list[str]:
    worst = max(costs, key=lambda cost: cost.peak)
    weights = worst.weights + tokenizer_bytes
    # a checkpoint is written with the training weights set aside; the copy of the model that it is written from is no card's
    moments = {"a step": worst.peak + tokenizer_bytes, "saving": weights + worst.optimizer + worst.average + worst.gradients}
    moment = max(moments, key=lambda name: moments[name])
    needed = moments[moment] * (1 + MARGIN) + FIXED_MARGIN
    told = {
        "weights": weights,
        "gradients": worst.gradients,
        "optimizer state": worst.optimizer,
        "weights' average": worst.average,
        "activations": worst.saved,
    }
    note = ["  (activations: with activation_checkpointing, what goes into the layers)"] if is_checkpointed else []
    lines = [f"  {name:<16}{num / 1e9:>16.3f}" for name, num in told.items()] + note
    lines += [f"  {f'most, in {moment}':<16}{moments[moment] / 1e9:>14.3f}  with what operations need in between"]
    lines += [f"  {'with a margin':<16}{needed / 1e9:>16.3f}  {MARGIN:.0%} for the allocator, {FIXED_MARGIN / 1e9:.0f} GB for CUDA"]
    verdicts = [
        f"  {f'{card} GB':<16}{f'fits, {left:.1f} GB left' if (left := card - needed / 1e9) >= 0 else f'too small by {-left:.1f} GB'}"
        for card in CARDS
    ]
    return ["", f"{'memory':<18}{'GB':>16}", *lines, "", "cards", *verdicts]
