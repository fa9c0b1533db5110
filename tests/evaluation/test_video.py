import json
import math

import jaxtyping
import numpy as np
import pytest
import torch

from dreamer.evaluation.intervals import bootstrap_interval, mean_interval, share_interval
from dreamer.evaluation.strips import dream_strip, dream_video
from dreamer.evaluation.video import (
    COPY_LAST_FRAME,
    MAX_PSNR,
    RECONSTRUCTION,
    SHUFFLED_ACTIONS,
    TRUE_ACTIONS,
    WorldModelResult,
    copy_last_frame,
    score_open_loop,
    ssim_per_frame,
)


@pytest.fixture
def no_shape_checks(monkeypatch):
    """The package's own checks answer where the shape checks of the tests would come first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def grey(*levels, size=16):
    """One episode whose frames each have one grey level."""
    return torch.tensor(levels, dtype=torch.uint8).reshape(1, -1, 1, 1, 1).expand(1, len(levels), 3, size, size).contiguous()


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def db(mse):
    return 10 * math.log10(255**2 / mse)


def test_ssim_is_one_for_equal_frames_and_falls_with_noise():
    frames = noise(2, 3, 3, 16, 16)
    assert ssim_per_frame(frames, frames) == pytest.approx(torch.ones(2, 3), abs=1e-6)
    disturbed = frames.clone()
    disturbed[1, 2] = noise(3, 16, 16, seed=1)
    ssim = ssim_per_frame(disturbed, frames)
    assert ssim[1, 2] < 0.5 and ssim[0, 2] == pytest.approx(1, abs=1e-6)


def test_ssim_of_flat_frames_by_hand():
    c1 = (0.01 * 255) ** 2  # flat frames have no variance: only the luminance term is left
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert ssim_per_frame(grey(100), grey(120))[0, 0].item() == pytest.approx(expected, abs=1e-3)  # float32 loses some of the variances


def test_frames_that_do_not_fit_are_refused(no_shape_checks):
    with pytest.raises(ValueError, match="same shape"):
        ssim_per_frame(grey(1, 2), grey(1))
    with pytest.raises(ValueError, match="at least 11"):
        ssim_per_frame(grey(1, size=8), grey(1, size=8))
    with pytest.raises(ValueError, match="not empty"):
        ssim_per_frame(grey(1)[:, :0], grey(1)[:, :0])


def test_headline_is_the_psnr_of_the_mean_error_not_the_mean_of_psnrs():
    truth = torch.cat([grey(10, 10), grey(50, 50)])
    predicted = torch.cat([grey(11, 13), grey(50, 60)])  # squared errors 1, 9 and 0, 100
    score = score_open_loop(truth, {TRUE_ACTIONS: predicted}, context=4, fps=8.0).scores[TRUE_ACTIONS]
    assert score.psnr.value == pytest.approx(db(110 / 4))
    assert [step.value for step in score.psnr_per_step] == pytest.approx([db(1 / 2), db(109 / 2)])
    assert score.mean_frame_psnr == pytest.approx((db(1) + db(9) + MAX_PSNR + db(100)) / 4)


def test_gaps_are_paired_and_leave_out_the_reconstruction():
    truth = torch.cat([grey(10, 10), grey(50, 50), grey(90, 90)])
    good = torch.cat([grey(12, 12), grey(54, 54), grey(98, 98)])
    bad = torch.cat([grey(30, 30), grey(90, 90), grey(170, 170)])  # ten times the error in every episode: 20 dB in every resample
    predictions = {TRUE_ACTIONS: good, SHUFFLED_ACTIONS: bad, RECONSTRUCTION: truth}
    result = score_open_loop(truth, predictions, context=4, fps=8.0)
    assert set(result.psnr_gaps) == {SHUFFLED_ACTIONS}
    gap = result.psnr_gaps[SHUFFLED_ACTIONS]
    assert (gap.value, gap.low, gap.high) == pytest.approx((20, 20, 20))
    score = result.scores[TRUE_ACTIONS].psnr
    assert score.low is not None and score.high is not None and score.low < score.value < score.high


def test_windows_of_one_episode_are_one_unit():
    truth, predicted = grey(10).repeat(4, 1, 1, 1, 1), torch.cat([grey(12), grey(12), grey(12), grey(30)])
    one = score_open_loop(truth, {TRUE_ACTIONS: predicted}, context=1, fps=8.0, episode_ids=[7, 7, 7, 7])
    assert (one.num_episodes, one.num_windows) == (1, 4)
    assert one.scores[TRUE_ACTIONS].psnr.low is None  # one episode gives no interval
    two = score_open_loop(truth, {TRUE_ACTIONS: predicted}, context=1, fps=8.0, episode_ids=[7, 7, 7, 9])
    assert two.num_episodes == 2
    assert one.scores[TRUE_ACTIONS].psnr.value == pytest.approx(two.scores[TRUE_ACTIONS].psnr.value)
    with pytest.raises(ValueError, match="2 episode_ids for 4 rows"):
        score_open_loop(truth, {TRUE_ACTIONS: predicted}, context=1, fps=8.0, episode_ids=[1, 2])


def test_result_survives_json_even_with_identical_frames():
    truth = noise(3, 4, 3, 16, 16)
    predictions = {TRUE_ACTIONS: truth, COPY_LAST_FRAME: copy_last_frame(truth, 4)}
    result = score_open_loop(truth, predictions, context=4, fps=8.0)
    text = json.dumps(result.to_json(), allow_nan=False)
    assert WorldModelResult.from_json(json.loads(text)) == result
    assert result.scores[TRUE_ACTIONS].psnr.value == MAX_PSNR
    assert (result.horizon, result.resolution, result.num_episodes) == (4, (16, 16), 3)


def test_copy_last_frame_repeats_the_last_one():
    context = noise(2, 3, 3, 4, 4)
    copied = copy_last_frame(context, 5)
    assert copied.shape == (2, 5, 3, 4, 4)
    assert all(torch.equal(copied[:, t], context[:, -1]) for t in range(5))


def test_the_interval_of_a_share_by_hand():
    none = share_interval(np.zeros(100, bool))  # Wilson: z^2 / (n + z^2) = 3.8415 / 103.8415
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(0.036994, abs=1e-5)
    half = share_interval(np.arange(10) < 5)  # 1 / 2 -+ z sqrt(n / 4 + z^2 / 4) / (n + z^2) = 0.5 -+ 0.26341
    assert (half.low, half.high) == (pytest.approx(0.23659, abs=1e-4), pytest.approx(0.76341, abs=1e-4))


def test_mean_interval_covers_the_mean_of_normal_samples():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = mean_interval(rng.normal(3.0, 1.0, 40), num_resamples=500, seed=trial)
        assert interval.low is not None and interval.high is not None
        hits += interval.low <= 3.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


def test_bootstrap_weights_units_by_their_size():
    contributions = np.array([[10.0, 10.0], [90.0, 30.0]])  # means 1 and 3, sizes 10 and 30
    assert bootstrap_interval(contributions, lambda t: t[..., 0] / t[..., 1]).value == 2.5
    with pytest.raises(ValueError, match="no units"):
        bootstrap_interval(contributions[:0], lambda t: t[..., 0])


def test_strip_shows_each_row_at_its_time():
    truth, dream = noise(10, 3, 16, 16), noise(10, 3, 16, 16, seed=1)
    strip = dream_strip(truth, {TRUE_ACTIONS: dream}, columns=4, scale=2)
    bottom, right = strip.shape[0] - 4, strip.shape[1] - 4  # a margin of one gap
    expected = dream[-1].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    assert np.array_equal(strip[bottom - 32 : bottom, right - 32 : right], expected)
    above = strip[bottom - 68 : bottom - 36, right - 32 : right]
    assert np.array_equal(above, truth[-1].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1))


def test_strip_of_a_short_clip_has_a_column_for_each_frame():
    truth = noise(3, 3, 16, 16)
    narrow, wide = dream_strip(truth[:2], {}, columns=8), dream_strip(truth, {}, columns=8)
    assert wide.shape[1] - narrow.shape[1] == 16 * 6 + 4


def test_video_has_a_panel_for_each_dream_and_marks_where_it_begins():
    truth = noise(6, 3, 16, 16)
    video = dream_video(truth, {TRUE_ACTIONS: truth, SHUFFLED_ACTIONS: truth}, context=2)
    assert len(video) == 6
    blue = (video == np.array([37, 99, 173])).all(-1).sum((1, 2))
    assert (blue[:2] == 0).all() and (blue[2:] > 0).all() and (np.diff(blue[2:]) > 0).all()


def test_a_dream_of_another_length_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match="true actions"):
        dream_strip(noise(4, 3, 16, 16), {TRUE_ACTIONS: noise(3, 3, 16, 16)})
