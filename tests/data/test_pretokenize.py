import dataclasses

import pytest
import torch

from dreamer.data import EpisodeStore, EpisodeWriter, LatentStore, PretokenizedDataset, pretokenize
from dreamer.data.shards import shard_paths

LENGTHS = [5, 9, 3, 17, 4]


class Interrupted(Exception):
    pass


def contents(path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.mark.parametrize("batch_frames", [4, 5, 256])
def test_stride_1_by_hand(make_store, pixel_tokenizer, tmp_path, batch_frames):
    store, tokenizer = make_store(LENGTHS), pixel_tokenizer()
    latents = pretokenize(store, tokenizer, tmp_path / "l", batch_frames=batch_frames)
    assert latents.lengths.tolist() == LENGTHS
    assert tokenizer.longest_clip <= batch_frames
    for number, length in enumerate(LENGTHS):
        assert latents.latents(number)[:, 0, 0].tolist() == [10 * number + t for t in range(length)]
        arrays = latents.arrays(number)
        assert arrays["rewards"].tolist() == list(range(length))
        assert arrays["actions"][:-1, 0, 0].tolist() == [t % 5 for t in range(length - 1)]
        assert arrays["action_mask"][:, 0].tolist() == [True] * (length - 1) + [False]
        assert arrays["terminals"].any() == (number % 2 == 1)


@pytest.mark.parametrize("batch_frames", [7, 9, 11, 256])
@pytest.mark.parametrize("overlap_steps", [0, 1])
def test_stride_3_in_segments_equals_whole_clips(make_store, pixel_tokenizer, tmp_path, batch_frames, overlap_steps):
    latents = pretokenize(make_store(LENGTHS), pixel_tokenizer(3), tmp_path / "l", batch_frames=batch_frames, overlap_steps=overlap_steps)
    assert latents.lengths.tolist() == [3, 4, 2, 7, 2]
    assert latents.latents(3)[:, 0, 0].tolist() == [30, 33, 36, 39, 42, 45, 46]  # the last step is partial
    assert latents.arrays(3)["rewards"].tolist() == [0, 6, 15, 24, 33, 42, 16]


def test_overlap_gives_a_tokenizer_its_past(make_store, pixel_tokenizer, tmp_path):
    """A tokenizer that also looks at the frame before: with an overlap of 1 its segments equal the whole clip."""

    class Remembers(pixel_tokenizer):
        def encode(self, frames):
            now = super().encode(frames)
            return now + torch.cat([now[:, :1] * 0, now[:, :-1]], 1)

    store = make_store([17])
    whole = pretokenize(store, Remembers(), tmp_path / "whole").latents(0)
    overlapping = pretokenize(store, Remembers(), tmp_path / "overlap", batch_frames=5, overlap_steps=1).latents(0)
    apart = pretokenize(store, Remembers(), tmp_path / "apart", batch_frames=5).latents(0)
    assert (whole == overlapping).all()
    assert not (whole == apart).all()


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_an_interrupted_run_goes_on_and_ends_the_same(make_store, pixel_tokenizer, tmp_path, stop_after):
    store = make_store(LENGTHS)
    pretokenize(store, pixel_tokenizer(), tmp_path / "whole", shard_episodes=2)

    def interrupt(done, total):
        assert total == 5
        if done == stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        pretokenize(store, pixel_tokenizer(), tmp_path / "parts", shard_episodes=2, progress=interrupt)
    calls = []
    pretokenize(store, pixel_tokenizer(), tmp_path / "parts", shard_episodes=2, progress=lambda *a: calls.append(a))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert calls == [(i, 5) for i in range(stop_after // 2 * 2 + 1, 6)]  # finished shards were not made again


def test_a_grown_store_is_continued(make_store, make_episode, pixel_tokenizer, space, tmp_path):
    store = make_store(LENGTHS)
    pretokenize(store, pixel_tokenizer(), tmp_path / "l")
    before = shard_paths(tmp_path / "l")[0].read_bytes()
    with EpisodeWriter(store.path, space, frames_per_second=20.0) as writer:
        writer.add(make_episode(6, 5))
    latents = pretokenize(EpisodeStore(store.path), pixel_tokenizer(), tmp_path / "l")
    assert latents.lengths.tolist() == [*LENGTHS, 6]
    assert shard_paths(tmp_path / "l")[0].read_bytes() == before


def test_whose_rewards_are_known_comes_along(make_store, make_episode, pixel_tokenizer, space, tmp_path):
    store = make_store(LENGTHS)
    with EpisodeWriter(store.path, space, frames_per_second=20.0) as writer:
        writer.add(dataclasses.replace(make_episode(6, 5), has_rewards=False))
    store = EpisodeStore(store.path)
    assert not store.episode(len(LENGTHS)).has_rewards
    latents = pretokenize(store, pixel_tokenizer(), tmp_path / "l")
    assert latents.has_rewards.tolist() == [True] * len(LENGTHS) + [False]
    dataset = PretokenizedDataset(latents, 2)
    assert dataset.batch([(0, 0), (len(LENGTHS), 0)]).has_rewards.tolist() == [True, False]


def test_max_episodes(make_store, pixel_tokenizer, tmp_path):
    assert len(pretokenize(make_store(LENGTHS), pixel_tokenizer(), tmp_path / "l", max_episodes=2)) == 2


def test_what_does_not_belong_together_is_refused(make_store, pixel_tokenizer, tmp_path):
    store = make_store(LENGTHS)
    pretokenize(store, pixel_tokenizer(), tmp_path / "l")
    with pytest.raises(ValueError, match="made by tokenizer pixels-1, not by other-1"):
        pretokenize(store, pixel_tokenizer(name="other"), tmp_path / "l")
    with pytest.raises(ValueError, match="holds latents of other episodes"):
        pretokenize(make_store(LENGTHS[::-1], name="reversed"), pixel_tokenizer(), tmp_path / "l")
    with pytest.raises(ValueError, match=r"dtype is 'float32'; cannot append with 'float16'"):
        pretokenize(store, pixel_tokenizer(), tmp_path / "l", dtype="float16")


def test_a_tokenizer_of_other_shapes_is_refused(make_store, pixel_tokenizer, tmp_path):
    store, tokenizer = make_store(LENGTHS), pixel_tokenizer()
    tokenizer.frame_shape = (3, 8, 8)
    with pytest.raises(ValueError, match=r"frames of shape \(3, 4, 4\); the tokenizer takes \(3, 8, 8\)"):
        pretokenize(store, tokenizer, tmp_path / "l")
    tokenizer = pixel_tokenizer()
    tokenizer.token_grid = (3, 1)
    with pytest.raises(ValueError, match=r"gave latents of shape \(1, 5, 2, 1\); expected \(1, 5, 3, 1\)"):
        pretokenize(store, tokenizer, tmp_path / "l")
    with pytest.raises(ValueError, match="batch_frames is 6"):
        pretokenize(store, pixel_tokenizer(3), tmp_path / "l", batch_frames=6)


def test_nan_latents_are_refused(make_store, pixel_tokenizer, tmp_path):
    class Broken(pixel_tokenizer):
        def encode(self, frames):
            return super().encode(frames) / 0 * 0

    with pytest.raises(ValueError, match="latents holds NaN"):
        pretokenize(make_store(LENGTHS), Broken(), tmp_path / "l")
    assert not (tmp_path / "l" / "store.json").exists() or len(LatentStore(tmp_path / "l")) == 0
