"""Minari datasets, made by minari itself where it is installed."""

import importlib
import io
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from dreamer.data import EpisodeStore, import_recordings
from dreamer.data.readers.minari import MinariReader, _frames, _is_image

IMAGE = gym.spaces.Box(0, 255, (12, 16, 3), np.uint8)


def test_without_minari_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "metadata.json").write_text(
        json.dumps({"data_format": "hdf5", "total_episodes": 1, "observation_space": "{}", "action_space": "{}"})
    )
    monkeypatch.setitem(sys.modules, "minari.dataset.minari_storage", None)
    with pytest.raises(ValueError, match=r"the reader 'minari' needs the package minari .*pip install -e '\.\[minari\]'"):
        MinariReader(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no episodes here; expected a Minari dataset"),
        ([], "no episodes here"),
        ({"data_format": "hdf5"}, r"metadata\.json: got total_episodes = None"),
        ({"data_format": "hdf5", "total_episodes": 10**9}, r"metadata\.json: got total_episodes = 1000000000"),
        ({"data_format": "hdf5", "total_episodes": 0}, "no episodes here"),
        # minari would import the environment that such a file names, to ask it for its spaces
        ({"data_format": "hdf5", "total_episodes": 1, "env_spec": "{}"}, r"metadata\.json: got no observation_space"),
        ({"data_format": "hdf5", "total_episodes": 1, "observation_space": "{}", "action_space": 3}, "got no action_space"),
    ],
)
def test_other_metadata_is_refused(tmp_path, metadata, message):
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        MinariReader(tmp_path)


@pytest.mark.parametrize("shape", [(12, 16, 3), (3, 12, 16), (12, 16, 1), (1, 12, 16), (12, 16)])
def test_images_of_every_layout_become_colour(shape):
    space = gym.spaces.Box(0, 255, shape, np.uint8)
    values = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    frames = _frames(space, values, None)
    assert _is_image(space) and frames.shape == (5, 12, 16, 3)
    first = values if shape[-1] == 3 else values.transpose(0, 2, 3, 1) if shape[0] == 3 else values.reshape(5, 12, 16, 1)
    assert np.array_equal(frames, np.broadcast_to(first, frames.shape))


def test_the_image_of_a_dictionary_is_found_or_named():
    space = gym.spaces.Dict({"pixels": IMAGE, "place": gym.spaces.Discrete(3)})
    values = {"pixels": np.zeros((2, 12, 16, 3), np.uint8), "place": np.zeros(2)}
    assert _frames(space, values, None).shape == (2, 12, 16, 3) and _frames(space, values, "pixels").shape == (2, 12, 16, 3)
    with pytest.raises(ValueError, match=r"image is 'place'; the observations that are images are \['pixels'\]"):
        _frames(space, values, "place")
    two = gym.spaces.Dict({"left": IMAGE, "right": IMAGE})
    with pytest.raises(ValueError, match="hold 2 images; name one with the option image"):
        _frames(two, {"left": values["pixels"], "right": values["pixels"]}, None)
    with pytest.raises(ValueError, match="expected uint8 images"):
        _frames(gym.spaces.Box(0, 1, (4,)), np.zeros((2, 4)), None)
    with pytest.raises(ValueError, match="observations are float64"):
        _frames(IMAGE, np.zeros((2, 12, 16, 3)), None)


def make_dataset(
    path: Path,
    actions: list[list],
    data_format: str = "hdf5",
    name: str = "dial/test-v0",
    action_space: gym.Space | None = None,
    observation_space: gym.Space = IMAGE,
) -> Path:
    """A dataset made by minari, one episode for each list of actions. Frame t has the brightness 40 t, the reward to it is t, and
    an episode ends by itself with its fifth step."""
    minari = pytest.importorskip("minari", reason="the extra 'minari' is not installed")
    pytest.importorskip({"hdf5": "h5py", "arrow": "pyarrow"}[data_format], reason=f"minari's format {data_format} is not installed")
    buffer = importlib.import_module("minari.data_collector").EpisodeBuffer
    episodes = []
    for i, taken in enumerate(actions):
        num = len(taken)
        episodes.append(
            buffer(
                id=i,
                observations=np.stack([np.full(observation_space.shape, 40 * t, observation_space.dtype) for t in range(num + 1)]),
                actions=np.array(taken),
                rewards=[float(t) for t in range(1, num + 1)],
                terminations=[t == 5 for t in range(1, num + 1)],
                truncations=[False] * num,
                infos={},
            )
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        minari.create_dataset_from_buffers(
            dataset_id=name,
            buffer=episodes,
            action_space=action_space or gym.spaces.Discrete(3),
            observation_space=observation_space,
            algorithm_name="test",
            author="a",
            author_email="a@b.c",
            code_permalink="https://a.b",
            data_format=data_format,
        )
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_a_dataset_that_minari_made(tmp_path, data_format):
    root = make_dataset(tmp_path / "sets", [[0, 1, 2, 1, 2], [2, 2, 0]], data_format)
    reader = MinariReader(root)
    first, second = reader.find(root)
    assert [(c.kind, c.size) for c in reader.action_space.components] == [("categorical", 3)]
    episode = reader.read(first)
    assert episode.frames.shape == (6, 3, 12, 16)
    assert np.abs(episode.frames.mean((1, 2, 3)) - 40 * np.arange(6)).max() < 3  # minari keeps images as JPEG
    assert episode.actions[:, 0].tolist() == [0, 1, 2, 1, 2, 0] and episode.action_mask.tolist() == [True] * 5 + [False]
    assert episode.rewards.tolist() == [0, 1, 2, 3, 4, 5] and episode.terminals.tolist() == [False] * 5 + [True]
    shorter = reader.read(second)
    assert len(shorter) == 4 and not shorter.terminals.any()
    small = MinariReader(root, size=[6, 8], frames_per_second=5.0).read(first)
    assert small.frames.shape == (6, 3, 6, 8) and abs(small.frames[2].mean() - 80) < 3


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_is_imported(tmp_path):
    root = make_dataset(tmp_path / "sets", [[0, 1, 2, 1, 2], [2, 2, 0]])
    for num_new in (2, 0):
        report = import_recordings(root, tmp_path / "store", "minari", options={"frames_per_second": 5.0})
        assert report.num_episodes == num_new
    store = EpisodeStore(tmp_path / "store")
    assert store.lengths.tolist() == [6, 4] and store.fps == 5
    assert store.infos[0]["source"].endswith("data/episode_00000")


@pytest.mark.filterwarnings("ignore")
def test_datasets_with_other_actions_are_refused(tmp_path):
    make_dataset(tmp_path / "sets", [[0, 1]], name="left/test-v0")
    other = make_dataset(tmp_path / "sets", [[np.float32([0.5, -1])]], name="right/test-v0", action_space=gym.spaces.Box(-1, 1, (2,)))
    reader = MinariReader(other)
    assert len(reader.read(reader.find(other)[0])) == 3
    with pytest.raises(ValueError, match="episode_00000: actions are Box.*; import it into another store"):
        reader.read(reader.find(other)[1])


@pytest.mark.filterwarnings("ignore")
def test_datasets_without_images_are_refused(tmp_path):
    root = make_dataset(tmp_path / "sets", [[0, 1]], observation_space=gym.spaces.Box(0, 255, (3,), np.float32))
    reader = MinariReader(root)
    with pytest.raises(ValueError, match="episode_00000: cannot be read .*expected uint8 images"):
        reader.read(reader.find(root)[0])


@pytest.mark.filterwarnings("ignore")
def test_damaged_datasets_are_named(tmp_path):
    root = make_dataset(tmp_path / "sets", [[0, 1]])
    reader = MinariReader(root)
    (recording,) = reader.find(root)
    (file,) = recording.parent.glob("main_data.hdf5")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="episode_00000: cannot be read"):
        reader.read(recording)
    metadata = recording.parent / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"action_space": '{"type": "Nothing"}'}))
    with pytest.raises(ValueError, match="data: cannot be opened"):
        MinariReader(root)


def huge(file, episode):
    del episode["rewards"]
    episode.create_dataset("rewards", shape=(1 << 40,), chunks=(1 << 10,), dtype="f8")  # nothing of it is stored


def outside(file, episode):
    del episode["rewards"]
    path = Path(file.filename).with_name("other.raw")
    path.write_bytes(bytes(64))
    episode.create_dataset("rewards", shape=(5,), dtype="f8", external=[(str(path), 0, 40)])


def linked(file, episode):
    del episode["rewards"]
    episode["rewards"] = importlib.import_module("h5py").ExternalLink("other.hdf5", "/secret")


def circle(file, episode):
    episode["infos/again"] = episode


def pictures(episode, content):
    """Observations as minari keeps them in JPEG."""
    del episode["observations"]
    bytes_each = importlib.import_module("h5py").vlen_dtype(np.uint8)
    made = episode.create_dataset("observations", shape=(6,), dtype=bytes_each)
    for i in range(6):
        made[i] = np.frombuffer(content, np.uint8)


def postscript(file, episode):
    pictures(episode, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n")


def bomb(file, episode):
    picture = io.BytesIO()
    Image.new("L", (1000, 1000)).save(picture, "JPEG", quality=1)
    pictures(episode, picture.getvalue())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge, "it unpacks to 8796093"),
        (outside, "the data of /episode_0/rewards lie in other files"),
        (linked, "rewards in /episode_0 is a ExternalLink"),
        (circle, "occurs twice"),
        (postscript, "picture 0 of /episode_0/observations is no JPEG"),
        (bomb, "it unpacks to 18000"),
    ],
)
def test_files_that_ask_for_too_much_or_for_others_are_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("dreamer.data.readers.hdf5.MAX_EPISODE_BYTES", 1 << 20)
    root = make_dataset(tmp_path / "sets", [[0, 1, 2, 1, 2]])
    reader = MinariReader(root)
    (recording,) = reader.find(root)
    assert len(reader.read(recording)) == 6
    with importlib.import_module("h5py").File(recording.parent / "main_data.hdf5", "r+") as file:
        change(file, file["episode_0"])
    with pytest.raises(ValueError, match=rf"episode_00000: cannot be read \(.*{message}"):
        reader.read(recording)
