import numpy as np
import pytest

from dreamer.data import EpisodeStore, LatentStore, LatentWriter
from dreamer.data.groups import plan_groups, read_groups


def latent_writer(path, space, **changes) -> LatentWriter:
    settings = {
        "tokenizer_fingerprint": "abc",
        "token_grid": (2, 2),
        "latent_channels": 3,
        "temporal_stride": 2,
        "source_fingerprint": "src",
    }
    return LatentWriter(path, action_space=space, **settings, **changes)


def latent_episode(steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.normal(size=(steps, 4, 3)).astype(np.float32),
        "actions": rng.integers(0, 2, (steps, 2, 4)).astype(np.float32),
        "action_mask": rng.random((steps, 2)) < 0.5,
        "rewards": rng.normal(size=steps).astype(np.float32),
        "terminals": np.arange(steps) == steps - 1,
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_latents_round_trip(space, tmp_path, dtype):
    with latent_writer(tmp_path / "l", space, dtype=dtype, shard_episodes=2) as writer:
        for i, steps in enumerate([4, 7, 5]):
            writer.add(**latent_episode(steps, i), task=i)
    store = LatentStore(tmp_path / "l")
    assert store.lengths.tolist() == [4, 7, 5]
    assert store.tasks.tolist() == [0, 1, 2]
    assert (store.token_grid, store.latent_channels, store.temporal_stride, store.actions_per_step) == ((2, 2), 3, 2, 2)
    assert store.is_complete and store.num_groups == 2 and store.quarantine == []
    for i, steps in enumerate([4, 7, 5]):
        expected = latent_episode(steps, i)
        expected["latents"] = expected["latents"].astype(dtype)
        for name, array in store.arrays(i, 1, steps - 1).items():
            assert np.array_equal(array, expected[name][1 : steps - 1]), name
        assert np.array_equal(store.latents(i, 2, 3), expected["latents"][2:3])


def test_latents_of_another_tokenizer_are_refused(space, tmp_path):
    with latent_writer(tmp_path / "l", space) as writer:
        writer.add(**latent_episode(4))
    store = LatentStore(tmp_path / "l")
    store.check_tokenizer("abc")
    with pytest.raises(ValueError, match="made by tokenizer abc, not by xyz"):
        store.check_tokenizer("xyz")
    with pytest.raises(ValueError, match="no episodes store|kind 'latents'"):
        EpisodeStore(tmp_path / "l")


def test_bad_latents_are_refused(space, tmp_path):
    writer = latent_writer(tmp_path / "l", space, dtype="float16")
    nan = latent_episode(4)
    nan["latents"][2, 1, 0] = np.nan
    with pytest.raises(ValueError, match="latents holds NaN"):
        writer.add(**nan)
    large = latent_episode(4)
    large["latents"][0] = 1e6
    with pytest.raises(ValueError, match="more than float16 can"):
        writer.add(**large)
    wrong = latent_episode(4)
    wrong["latents"] = wrong["latents"][:, :3]
    with pytest.raises(ValueError, match=r"latents: got|latents is float16 \(4, 3, 3\); expected float16 \(4, 4, 3\)"):
        writer.add(**wrong)


def test_an_exception_leaves_no_odd_latent_shard(space, tmp_path):
    with pytest.raises(RuntimeError), latent_writer(tmp_path / "l", space, shard_episodes=2) as writer:
        for i in range(3):
            writer.add(**latent_episode(4, i))
        raise RuntimeError
    assert LatentStore(tmp_path / "l").num_episodes == 2


def write_group(path, space, number, fingerprint, lengths, quarantine=()):
    writer = latent_writer(path, space, shard_episodes=None)
    for length in lengths:
        writer.add(**latent_episode(length))
    writer.write_group(number, fingerprint, [{"name": name, "reason": "torn"} for name in quarantine])


def test_groups_make_a_store_once_all_are_there(space, tmp_path):
    path, sources = tmp_path / "l", [(name, "4 bytes") for name in "abcde"]
    groups = plan_groups(path, sources, tmp_path, shard_episodes=2)
    prints = [groups.fingerprint(number) for number in range(3)]
    assert len(groups) == 3 and [name for name, _ in groups[1]] == ["c", "d"] and len(set(prints)) == 3
    write_group(path, space, 2, prints[2], [], "e")
    write_group(path, space, 0, prints[0], [4, 5])
    with pytest.raises(ValueError, match="incomplete: 2 of 3 groups of episodes are there; run pretokenize again"):
        LatentStore(path)
    write_group(path, space, 1, "of other episodes", [6, 6])
    assert LatentStore(path, allow_partial=True).finished == {0, 2}
    write_group(path, space, 1, prints[1], [7], "c")
    store = LatentStore(path)
    assert store.lengths.tolist() == [4, 5, 7]
    assert [entry["name"] for entry in store.quarantine] == ["c", "e"]
    plan_groups(path, [*sources, ("f", "4 bytes")], tmp_path, shard_episodes=2)
    assert LatentStore(path, allow_partial=True).finished == {0, 1}


def test_a_group_of_other_content_is_another_group(tmp_path):
    before = plan_groups(tmp_path, [("a", "4 bytes"), ("b", "4 bytes")], tmp_path, shard_episodes=1)
    after = plan_groups(tmp_path, [("b", "5 bytes"), ("a", "4 bytes")], tmp_path, shard_episodes=1)
    assert [name for name, _ in after.sources] == ["a", "b"]
    assert [after.fingerprint(n) == before.fingerprint(n) for n in range(2)] == [True, False]
    assert read_groups(tmp_path) == after
    with pytest.raises(ValueError, match="'b' is not found"):
        plan_groups(tmp_path, [("a", "4 bytes")], tmp_path, shard_episodes=1)
    (tmp_path / "sources.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sources\.json: cannot be read"):
        read_groups(tmp_path)


def test_one_action_for_several_frames(space, tmp_path):
    episode = latent_episode(4)
    episode["actions"], episode["action_mask"] = episode["actions"][:, :1], episode["action_mask"][:, :1]
    with latent_writer(tmp_path / "l", space, actions_per_step=1) as writer:
        writer.add(**episode)
    store = LatentStore(tmp_path / "l")
    assert (store.temporal_stride, store.actions_per_step) == (2, 1)
    assert np.array_equal(store.arrays(0)["actions"], episode["actions"])
