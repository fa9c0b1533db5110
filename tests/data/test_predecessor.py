import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch

from dreamer.data import LatentStore, PretokenizedDataset, convert_predecessor, create_pretokenized_dataloader, open_latents
from dreamer.data.predecessor import UNKNOWN_TOKENIZER
from dreamer.ops.minecraft import CAMERA_STILL, MINERL


def keys_and_camera(num_rows: int) -> dict[str, torch.Tensor]:
    """Row t presses key t % 8, the camera's class is t % 121."""
    keyboard = torch.zeros(num_rows, 8)
    keyboard[torch.arange(num_rows), torch.arange(num_rows) % 8] = 1
    return {"keyboard": keyboard, "camera": torch.arange(num_rows) % 121}


def write(folder, num_steps: int, num_rows: int, **changes):
    """An episode: latents of step t are t, reward of row t is t. ``changes`` replace files by their names; None leaves one out."""
    files = {
        "latents": torch.arange(num_steps).half()[:, None, None].expand(-1, 16, 16).contiguous(),
        "actions": keys_and_camera(num_rows),
        "rewards": torch.arange(num_rows).float(),
    }
    folder.mkdir(parents=True)
    for name, value in (files | changes).items():
        if value is not None:
            torch.save(value, folder / f"{name}.pt")


@pytest.fixture
def root(tmp_path):
    """Two episodes: 17 frames give 3 latent steps, 33 give 5."""
    write(tmp_path / "old" / "episode_00000", 3, 17)
    write(tmp_path / "old" / "episode_00001", 5, 33, info={"num_frames": 33, "num_latent_steps": 5})
    return tmp_path / "old"


def test_a_step_keeps_its_eight_actions_and_the_rewards_that_came_with_it(root, tmp_path):
    store = convert_predecessor(root, tmp_path / "new")
    assert (len(store), store.token_grid, store.latent_channels, store.temporal_stride) == (2, (4, 4), 16, 8)
    assert store.action_space == MINERL
    rows = store.arrays(0)
    assert rows["latents"].dtype == np.float16 and rows["latents"][:, 5, 7].tolist() == [0, 1, 2]
    assert rows["actions"].shape == (3, 8, 9)
    assert rows["actions"][1, :, 8].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]  # taken at the frames 8 .. 15, after step 1
    assert rows["actions"][1, 3, :8].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert rows["action_mask"].sum(1).tolist() == [8, 8, 1]  # 17 frames, 17 actions
    assert rows["rewards"].tolist() == [0, sum(range(8)), sum(range(8, 16))]  # reward t is caused by action t: it arrives at frame t + 1
    assert not rows["terminals"].any() and store.has_rewards.all()


def test_one_action_fewer_than_frames(root, tmp_path):
    write(root / "episode_00002", 3, 16, info={"num_frames": 17})
    rows = convert_predecessor(root, tmp_path / "new").arrays(2)
    assert rows["action_mask"].sum(1).tolist() == [8, 8, 0]
    assert rows["rewards"].tolist() == [0, sum(range(8)), sum(range(8, 16))]


def test_steps_that_were_encoded_twice_are_left_out(tmp_path):
    """200 frames in pieces of 64 that overlap by 8: 9 + 8 + 8 + 4 steps, where 26 are enough. The pieces' ends are repeated."""
    write(tmp_path / "old" / "episode_00000", 29, 200)
    rows = convert_predecessor(tmp_path / "old", tmp_path / "new").arrays(0)
    kept = rows["latents"][:, 0, 0].tolist()
    assert kept == [t for t in range(29) if t not in (8, 16, 24)]
    assert rows["actions"][:25, 0, 8].tolist() == [8 * t % 121 for t in range(25)]


def test_frames_that_filled_no_step_are_left_out(tmp_path):
    """An encoder that does not fill up: 204 frames give 1 + 203 // 8 = 26 steps, the last of which ends at frame 200."""
    write(tmp_path / "old" / "episode_00000", 26, 204)
    rows = convert_predecessor(tmp_path / "old", tmp_path / "new").arrays(0)
    assert len(rows["latents"]) == 26
    assert rows["action_mask"].sum() == 201
    assert rows["rewards"].sum() == sum(range(200))


def test_actions_that_were_subsampled_are_one_a_step(tmp_path):
    write(tmp_path / "old" / "episode_00000", 5, 5)
    store = convert_predecessor(tmp_path / "old", tmp_path / "new")
    rows = store.arrays(0)
    assert (store.temporal_stride, store.actions_per_step) == (8, 1)
    assert rows["actions"].shape == (5, 1, 9) and rows["actions"][:, 0, 8].tolist() == [0, 1, 2, 3, 4]
    assert rows["rewards"].tolist() == [0, 0, 1, 2, 3]
    batch = PretokenizedDataset(store, 3)[1]
    assert batch.prev_actions[0, :, 0, 8].tolist() == [0, 1, 2]


def test_actions_that_the_predecessor_did_not_find_are_unknown(root, tmp_path):
    write(root / "episode_00002", 3, 17, actions=torch.zeros(17, dtype=torch.long))
    store = convert_predecessor(root, tmp_path / "new")
    assert not store.arrays(2)["action_mask"].any()
    assert store.arrays(1)["action_mask"].any()


def test_nine_columns_and_an_action_space_of_ones_own(root, tmp_path):
    actions = keys_and_camera(17)
    write(tmp_path / "nine" / "episode_0", 3, 17, actions=torch.cat([actions["keyboard"], actions["camera"][:, None].float()], 1))
    ours = convert_predecessor(root, tmp_path / "a").arrays(0)["actions"]
    assert np.array_equal(convert_predecessor(tmp_path / "nine", tmp_path / "b").arrays(0)["actions"], ours)
    write(tmp_path / "one" / "episode_0", 3, 17, actions=torch.arange(17) % 12)
    space = [{"name": "action", "kind": "categorical", "size": 12}]
    assert convert_predecessor(tmp_path / "one", tmp_path / "c", action_space=space).arrays(0)["actions"][1, :, 0].max() == 11
    with pytest.raises(ValueError, match=r"actions.pt: got 1 columns; expected MineRL's 9, or action_space"):
        convert_predecessor(tmp_path / "one", tmp_path / "d")


def test_latents_in_another_memory_order_and_type(tmp_path):
    latents = torch.arange(3 * 16 * 8).bfloat16().reshape(3, 8, 16).transpose(1, 2)
    write(tmp_path / "old" / "episode_0", 3, 17, latents=latents)
    found = convert_predecessor(tmp_path / "old", tmp_path / "new").latents(0)
    assert found.dtype == np.float32 and np.array_equal(found, latents.float().numpy())


def test_no_tokenizer_fits(root, tmp_path):
    store = convert_predecessor(root, tmp_path / "new")
    assert store.tokenizer_fingerprint == UNKNOWN_TOKENIZER
    with pytest.raises(ValueError, match="latents were made by tokenizer unknown: converted from the predecessor's latents.pt, not by f00"):
        store.check_tokenizer("f00")


def test_the_loader_opens_the_folder_and_converts_it_once(root):
    with pytest.warns(UserWarning, match="Nothing tells which tokenizer weights"):
        loader = create_pretokenized_dataloader(data_path=root, batch_size=2, sequence_length=3, split="all")
    (batch,) = [b for b, _ in zip(loader, range(1), strict=False)]
    assert batch.latents.shape == (2, 3, 16, 16) and batch.latents.dtype == torch.float32
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(PretokenizedDataset(root, 3)) == 1 + 3
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    write(root / "episode_00002", 3, 17)
    with pytest.raises(ValueError, match="its episodes changed since .*latent_store was made"):
        open_latents(root)


def test_a_store_is_opened_as_it_is(root, tmp_path):
    convert_predecessor(root, tmp_path / "new")
    assert isinstance(open_latents(tmp_path / "new"), LatentStore)
    with pytest.raises(ValueError, match="no latents store here"):
        open_latents(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        convert_predecessor(root, tmp_path / "new")


NAN = torch.full((3, 16, 16), float("nan"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latents": None}, "latents.pt: cannot be read"),
        ({"actions": None}, "actions.pt: cannot be read"),
        ({"rewards": None}, "rewards.pt: cannot be read"),
        ({"latents": NAN}, "latents.pt: got NaN or infinity"),
        ({"latents": torch.zeros(3, 256)}, r"latents.pt: got float32 \(3, 256\)"),
        ({"latents": torch.zeros(3, 16, 16, dtype=torch.long)}, "latents.pt: got int64"),
        ({"latents": torch.zeros(3, 64, 16).half()}, r"got latent steps \(64, 16\) of float16.*as in episode_00000"),
        ({"latents": torch.zeros(3, 16, 16)}, "of float32 with 8 actions each.*as in episode_00000"),
        ({"latents": torch.zeros(5, 16, 16).half()}, "got 5 latent steps beside 17 actions"),
        ({"latents": [1, 2]}, "latents.pt: got list; expected a tensor"),
        ({"latents": torch.zeros(3, 16, 16).half().to_sparse()}, "latents.pt: got Tensor; expected a tensor of numbers"),
        ({"latents": torch.zeros(1, 1, 1).half().expand(3, 16, 16)}, "as many numbers as its shape promises"),
        ({"rewards": torch.zeros(3)}, r"rewards.pt: got shape \(3,\); expected \(17,\)"),
        ({"actions": {"keyboard": torch.zeros(17, 8)}}, r"got the actions \['keyboard'\]"),
        ({"actions": keys_and_camera(17) | {"camera": torch.full((17,), 121)}}, r"action 'camera' has values in \[121, 121\]"),
        ({"actions": keys_and_camera(17) | {"camera": torch.full((16,), CAMERA_STILL)}}, "expected one row of actions for each frame"),
        ({"info": {"num_frames": 25}}, "info.pt: got num_frames = 25; expected 17 or 18"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(root, tmp_path, changes, said):
    write(root / "episode_00002", 3, 17, **changes)
    with pytest.raises(ValueError, match=said):
        convert_predecessor(root, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_in_a_file_is_executed(root, tmp_path):
    write(root / "episode_00002", 3, 17, latents=Bomb())
    with pytest.raises(ValueError, match=r"latents.pt: cannot be read \(UnpicklingError\)"):
        convert_predecessor(root, tmp_path / "new")
    (root / "episode_00002" / "latents.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"latents.pt: cannot be read \(File is not a zip file\)"):
        convert_predecessor(root, tmp_path / "new")


def test_sizes_are_checked_before_anything_is_read(root, tmp_path, monkeypatch):
    file = root / "episode_00000" / "latents.pt"
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(1 << 20))
    monkeypatch.setattr("dreamer.data.predecessor.MAX_BYTES", 1 << 19)
    with pytest.raises(ValueError, match=r"latents.pt: it unpacks to 10\d+ bytes, more than 524288"):
        convert_predecessor(root, tmp_path / "new")


def test_a_truncated_file(root, tmp_path):
    file = root / "episode_00001" / "rewards.pt"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"rewards.pt: cannot be read"):
        convert_predecessor(root, tmp_path / "new")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no episodes here; expected folders episode_\*"):
        convert_predecessor(tmp_path, tmp_path / "new")
