"""Action spaces as Gymnasium's, there and back."""

import gymnasium
import numpy as np

from dreamer.data.actions import ActionCodec
from dreamer.ops.spaces import gym_space
from dreamer.types import ActionComponent, ActionSpace


def test_spaces_of_every_kind() -> None:
    space = ActionSpace((ActionComponent("z", "categorical", 4), ActionComponent("a", "binary", 3), ActionComponent("m", "continuous", 2)))
    codec = ActionCodec(gym_space(space))
    assert [(c.name, c.kind, c.size) for c in codec.space.components] == [(c.name, c.kind, c.size) for c in space.components]
    row = np.array([2, 1, 0, 1, 0.5, -0.5], np.float32)
    assert np.array_equal(codec.encode(codec.decode(row)), row)
    assert gym_space(ActionSpace(space.components[:1])) == gymnasium.spaces.Discrete(4)
