import numpy as np
import pytest

from dreamer.evaluation.contact_sheet import MARK, SheetRow, action_words, contact_sheet
from dreamer.ops.minecraft import MINERL_ITEMS, VPT
from dreamer.types import ActionComponent, ActionSpace


def row(space: ActionSpace, **values: float) -> np.ndarray:
    """A row of columns by component or label."""
    actions = np.zeros(space.num_columns, np.float32)
    for component, columns in space.slices():
        for i in range(component.num_columns):
            name = component.labels[i] if component.kind == "binary" else component.name
            actions[columns.start + i] = values.get(name, 0)
    return actions


def test_actions_become_words():
    assert action_words(VPT, row(VPT, forward=1, attack=1, camera=61)) == ["forward", "attack", "right 0.6"]
    assert action_words(VPT, row(VPT, camera=60)) == []
    assert action_words(MINERL_ITEMS, row(MINERL_ITEMS, camera=60, place=6, craft=0)) == ["place torch"]
    discrete = ActionSpace((ActionComponent("action", "categorical", 3, labels=("left", "stay", "right")),))
    assert action_words(discrete, np.array([2.0])) == ["right"]
    plain = ActionSpace(
        (ActionComponent("move", "categorical", 3), ActionComponent("turn", "continuous", 2), ActionComponent("keys", "binary", 2))
    )
    assert action_words(plain, np.array([1, 0.5, -1, 0, 1])) == ["move 1", "turn 0.5 -1", "keys1"]


def sheet_row(
    num: int = 3, size: tuple[int, int] = (64, 64), channels: int = 3, actions: np.ndarray | None = None, known: bool = True
) -> SheetRow:
    frames = np.full((num, channels, *size), 90, np.uint8)
    rows = np.zeros((num, 24), np.float32) if actions is None else np.tile(actions.astype(np.float32), (num, 1))
    return SheetRow("one", list(range(num)), frames, rows, np.full(num, known))


@pytest.mark.parametrize(
    ("size", "cell"), [((64, 64), (192, 192)), ((64, 96), (192, 288)), ((360, 640), (360, 640)), ((720, 1280), (192, 341))]
)
def test_frames_are_scaled_to_a_sheet(size, cell):
    sheet = contact_sheet([sheet_row(3, size), sheet_row(2, size)], VPT)
    assert sheet.shape == (2 * (cell[0] + 24 + 6) + 6, 3 * (cell[1] + 6) + 6, 3) and sheet.dtype == np.uint8
    assert contact_sheet([sheet_row(1, size, channels=1)], VPT).shape[2] == 3


def marked(sheet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.nonzero((sheet == MARK).all(-1))


def test_the_picture_depends_on_the_action():
    still = contact_sheet([sheet_row(1, actions=row(VPT, camera=60))], VPT)
    pressed = contact_sheet([sheet_row(1, actions=row(VPT, camera=60, jump=1))], VPT)
    unknown = contact_sheet([sheet_row(1, actions=row(VPT, camera=60, jump=1), known=False)], VPT)
    assert len({image.tobytes() for image in (still, pressed, unknown)}) == 3
    assert len(marked(still)[0]) == len(marked(unknown)[0]) == 0
    middle = (24 + 6 + 96, 6 + 96)
    right = marked(contact_sheet([sheet_row(1, actions=row(VPT, camera=65))], VPT))  # yaw + 10
    assert right[1].max() > middle[1] + 60 and right[0].max() < middle[0] + 10
    up = marked(contact_sheet([sheet_row(1, actions=row(VPT, camera=5))], VPT))  # pitch - 10
    assert up[0].min() < middle[0] - 60 and up[1].max() < middle[1] + 10


def test_many_words_stay_on_the_frame():
    everything = row(VPT, camera=120) + np.r_[np.ones(23), 0]
    assert contact_sheet([sheet_row(1, actions=everything)], VPT).shape == contact_sheet([sheet_row(1)], VPT).shape


def test_a_sheet_needs_a_frame():
    with pytest.raises(ValueError, match="got no frames"):
        contact_sheet([], VPT)
