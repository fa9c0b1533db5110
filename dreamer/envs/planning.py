"""Breadth-first search over the states of a small world."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

State = TypeVar("State", bound=Hashable)


def shortest_plan(
    start: State, successors: Callable[[State], Iterable[tuple[int, State]]], is_goal: Callable[[State], bool]
) -> list[int] | None:
    """The actions of a shortest way from ``start`` to a goal ([] if there already), or None if no goal can be reached.

    ``successors(state)`` yields (action, next state); among equally short ways the first found in that order wins.
    """
    came_from: dict[State, tuple[int, State] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if is_goal(state):
            plan = []
            while (step := came_from[state]) is not None:
                plan.append(step[0])
                state = step[1]
            return plan[::-1]
        for action, following in successors(state):
            if following not in came_from:
                came_from[following] = (action, state)
                queue.append(following)
    return None
