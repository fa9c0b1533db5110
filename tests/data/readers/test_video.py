import os
from pathlib import Path

import av
import numpy as np
import pytest

from dreamer.data.readers import make_reader
from dreamer.data.readers.video import UNLABELLED, VideoReader
from dreamer.types import ActionComponent, ActionSpace


def write(path: Path, num_frames: int = 12, rate: int = 10, size: tuple[int, int] = (48, 64)) -> Path:
    """Frame t is grey of brightness 20 t."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for t in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 20 * t, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_come_in_order_and_in_size(tmp_path):
    video = write(tmp_path / "deep" / "one.mp4")
    reader = VideoReader(tmp_path, size=(16, 24))
    assert reader.find(tmp_path) == [video]
    assert reader.frames_per_second == 10
    episode = reader.read(video)
    assert episode.frames.shape == (12, 3, 16, 24)
    assert np.abs(episode.frames.mean((1, 2, 3)) - 20 * np.arange(12)).max() < 6


def test_a_config_gives_the_size_as_a_list(tmp_path):
    video = write(tmp_path / "one.mp4")
    assert make_reader("video", tmp_path, size=[16, 24]).read(video).frames.shape == (12, 3, 16, 24)


def test_no_action_is_known(tmp_path):
    video = write(tmp_path / "one.mp4")
    episode = VideoReader(tmp_path).read(video)
    assert VideoReader(tmp_path).action_space == UNLABELLED
    assert not episode.has_rewards
    assert not episode.action_mask.any()
    space = ActionSpace((ActionComponent("keys", "binary", 4), ActionComponent("camera", "categorical", 121)))
    assert VideoReader(tmp_path, action_space=space).read(video).actions.shape == (12, 5)


def test_another_rate_is_refused(tmp_path):
    write(tmp_path / "a.mp4", rate=10)
    other = write(tmp_path / "b.mp4", rate=20)
    with pytest.raises(ValueError, match=r"b\.mp4: 20 frames per second, the first video has 10"):
        VideoReader(tmp_path).read(other)
    assert len(VideoReader(tmp_path, frames_per_second=10.0).read(other)) == 12


def test_long_videos_are_refused(tmp_path):
    video = write(tmp_path / "one.mp4")
    with pytest.raises(ValueError, match=r"one\.mp4: more than 11 frames"):
        VideoReader(tmp_path, max_frames=11).read(video)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_cut_videos_are_named(tmp_path, share):
    reader = VideoReader(write(tmp_path / "whole.mp4"), frames_per_second=10.0)
    content = (tmp_path / "whole.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cut\.mp4: cannot be decoded"):
        reader.read(cut)


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.mp4: not a video that can be opened"):
        VideoReader(tmp_path)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        container.add_stream("aac", rate=44100)
        container.start_encoding()
    with pytest.raises(ValueError, match=r"sound\.mp4: (not a video|cannot be decoded)"):
        VideoReader(tmp_path / "sound.mp4")


def test_a_folder_without_videos_is_named(tmp_path):
    with pytest.raises(ValueError, match="no videos here"):
        VideoReader(tmp_path)


@pytest.mark.skipif("DREAMER_SAMPLE_DATA" not in os.environ, reason="DREAMER_SAMPLE_DATA names no folder of sample recordings")
def test_real_videos():
    folder = Path(os.environ["DREAMER_SAMPLE_DATA"]) / "minerl_navigate"
    reader = VideoReader(folder)
    lengths = [len(reader.read(video)) for video in reader.find(folder)]
    assert lengths == [500] * 4
