"""What many episodes hold, added up one episode at a time: lengths, returns, and how often each action was taken."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from dreamer.ops.minecraft import CAMERA, CAMERA_BINS, decode_camera
from dreamer.types import ActionComponent, ActionSpace

NUM_BINS = 10  # of the histogram of a continuous action
MOST = 12  # categories and columns that are worth a place in a line of text


class ActionTally:
    """How often one component of an action took which value."""

    def __init__(self, component: ActionComponent) -> None:
        self.component = component
        self.num = 0
        self.counts = np.zeros((component.size, NUM_BINS) if component.kind == "continuous" else component.size, np.int64)
        self.labels = component.labels or tuple(str(i) for i in range(component.size))

    def add(self, values: Float[np.ndarray, "n columns"]) -> None:
        self.num += len(values)
        if self.component.kind == "categorical":
            self.counts += np.bincount(values[:, 0].astype(np.int64), minlength=self.component.size)
        elif self.component.kind == "binary":
            self.counts += np.count_nonzero(values, axis=0)
        else:
            span = (self.component.low, self.component.high)
            self.counts += np.stack([np.histogram(column, NUM_BINS, span)[0] for column in values.T])

    @property
    def shares(self) -> Float[np.ndarray, "..."]:
        """Of the known actions: of each category, of each column that was pressed, or of each bin of each column."""
        return self.counts / max(self.num, 1)

    def to_json(self) -> dict[str, Any]:
        shares = {label: share.tolist() for label, share in zip(self.labels, self.shares, strict=True)}
        more = {"low": self.component.low, "high": self.component.high} if self.component.kind == "continuous" else {}
        return {"name": self.component.name, "kind": self.component.kind, "num_known": self.num, "shares": shares} | more

    def lines(self) -> list[str]:
        """For people: the commonest first, then what never happened."""
        if self.component.kind == "continuous":
            edges = np.linspace(self.component.low, self.component.high, NUM_BINS + 1)
            rows = [("from", edges[:-1]), *((label, 100 * share) for label, share in zip(self.labels, self.shares, strict=True))]
            return table(rows)
        order = np.argsort(-self.counts, kind="stable")
        seen = [f"{self.labels[i]} {100 * self.shares[i]:.1f} %" for i in order if self.counts[i]]
        never = [label for label, count in zip(self.labels, self.counts, strict=True) if not count]
        rest = f", and {len(seen) - MOST} more" if len(seen) > MOST else ""
        lines = [", ".join(seen[:MOST]) + rest or "nothing"]
        if never:
            lines.append(f"never: {', '.join(never) if len(never) <= MOST else f'{len(never)} of {len(self.labels)}'}")
        return lines + (self._camera_lines() if self.component == CAMERA else [])

    def _camera_lines(self) -> list[str]:
        """How far the camera turned, each axis by itself."""
        grid = 100 * self.shares.reshape(CAMERA_BINS, CAMERA_BINS)
        degrees = decode_camera(np.arange(CAMERA_BINS))[:, 1]
        return table([("degrees", degrees), ("pitch %", grid.sum(1)), ("yaw %", grid.sum(0))])


class EpisodeTally:
    """Lengths, returns and actions of the episodes that were added."""

    def __init__(self, space: ActionSpace) -> None:
        self.space = space
        self.actions = [ActionTally(component) for component in space.components]
        self.lengths: list[int] = []
        self.returns: list[float] = []  # of the episodes whose rewards are known
        self.num_ended = self.num_actions = self.num_known = self.num_rewarded = 0

    def add(
        self,
        actions: Float[np.ndarray, "n A"],
        mask: Bool[np.ndarray, " n"],
        rewards: Float[np.ndarray, " F"],
        terminals: Bool[np.ndarray, " F"],
        has_rewards: bool,
    ) -> None:
        """One episode, of n = F actions, or as many as latent steps have room for."""
        self.lengths.append(len(rewards))
        self.num_actions, self.num_known = self.num_actions + len(mask), self.num_known + int(mask.sum())
        for tally, (_, columns) in zip(self.actions, self.space.slices(), strict=True):
            tally.add(actions[mask][:, columns])
        if has_rewards:
            self.returns.append(float(rewards.sum(dtype=np.float64)))
            self.num_ended += bool(terminals[-1])
            self.num_rewarded += int(np.count_nonzero(rewards))

    @property
    def known_share(self) -> float:
        """Of the actions: those that are known."""
        return self.num_known / max(self.num_actions, 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "num_episodes": len(self.lengths),
            "num_steps": sum(self.lengths),
            "lengths": self.lengths,
            "returns": self.returns,
            "num_with_rewards": len(self.returns),
            "num_ended_by_themselves": self.num_ended,
            "known_actions": self.known_share,
            "actions": [tally.to_json() for tally in self.actions],
        }

    def lines(self, unit: str) -> list[tuple[str, str]]:
        """Titles and texts. ``unit``: what a step is."""
        lines = [("lengths", f"{spread(self.lengths, '.0f')} {unit}, {sum(self.lengths)} in all")]
        if self.returns:
            unknown = len(self.lengths) - len(self.returns)
            text = f"{spread(self.returns, '.4g')}; {self.num_rewarded} {unit} with a reward; {self.num_ended} episodes ended by themselves"
            lines.append(("returns", text + (f"; not known of {unknown} episodes" if unknown else "")))
        else:
            lines.append(("returns", "not known"))
        lines.append(("actions", f"{100 * self.known_share:.1f} % known"))
        for tally in self.actions if self.num_known else []:
            texts = tally.lines()
            lines += [(f"  {tally.component.name}", texts[0]), *(("", text) for text in texts[1:])]
        return lines


def spread(values: list[int] | list[float], form: str) -> str:
    """``3 to 9, median 5``."""
    if min(values) == max(values):
        return format(values[0], form)
    return f"{min(values):{form}} to {max(values):{form}}, median {float(np.median(values)):{form}}"


def table(rows: list[tuple[str, Shaped[np.ndarray, " n"]]]) -> list[str]:
    """Numbers below each other, to one digit after the point."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}" + "".join(f"{value:7.1f}" for value in values.tolist()) for name, values in rows]
