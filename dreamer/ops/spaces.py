"""Action spaces in Gymnasium's words; ``dreamer/data/actions.py`` has the way back."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import gymnasium
import numpy as np

from dreamer.types import ActionComponent, ActionSpace


def gym_space(space: ActionSpace) -> gymnasium.Space[Any]:
    """The Gymnasium space of an action space: that of its only component, or a Dict of all in their order."""

    def of(component: ActionComponent) -> gymnasium.Space[Any]:
        if component.kind == "categorical":
            return gymnasium.spaces.Discrete(component.size)
        if component.kind == "binary":
            return gymnasium.spaces.MultiBinary(component.size)
        return gymnasium.spaces.Box(component.low, component.high, (component.size,), np.float32)

    if len(space.components) == 1:
        return of(space.components[0])
    return gymnasium.spaces.Dict(OrderedDict((c.name, of(c)) for c in space.components))  # a plain dict would be sorted
