import io
import json
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dreamer.training.logging import RunLogger


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def quiet(run_dir, total_steps=10, **options):
    return RunLogger(run_dir, "phase", total_steps=total_steps, **{"tensorboard": False, "console": Console(file=io.StringIO()), **options})


def test_rows_are_json_objects_with_their_step(tmp_path):
    with quiet(tmp_path) as logger:
        logger.log(1, {"loss": 0.5, "count": 3})
        logger.log(2, {"loss": torch.tensor(0.25)})
        assert rows(tmp_path) == [{"step": 1, "loss": 0.5, "count": 3.0}, {"step": 2, "loss": 0.25}]  # on disk before close


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))], ids=str)
def test_a_value_that_is_not_finite_is_refused_with_its_key_and_writes_nothing(tmp_path, value):
    with quiet(tmp_path) as logger:
        with pytest.raises(ValueError, match=r"'value_loss'.*step 7"):
            logger.log(7, {"loss": 1.0, "value_loss": value})
        assert rows(tmp_path) == []


@pytest.mark.parametrize(("key", "value"), [("step", 1.0), ("loss", torch.zeros(2))])
def test_other_bad_values_are_refused_with_their_key(tmp_path, key, value):
    with quiet(tmp_path) as logger, pytest.raises(ValueError, match=f"'{key}'"):
        logger.log(1, {key: value})


def test_resume_drops_later_rows_and_a_line_that_was_cut_off(tmp_path):
    with quiet(tmp_path) as logger:
        for step in range(1, 6):
            logger.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with quiet(tmp_path, resume_step=3) as logger:
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
        logger.log(4, {"loss": 40})
    assert rows(tmp_path)[2:] == [{"step": 3, "loss": 3.0}, {"step": 4, "loss": 40.0}]


def test_the_name_of_new_rows_is_on_the_disk_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("dreamer.training.logging.fsync_path", lambda path: synced.append((path, [p.name for p in path.iterdir()])))
    for _ in range(2):
        with quiet(tmp_path):
            assert synced == [(tmp_path, ["metrics.jsonl"])]


def test_resume_at_zero_starts_afresh(tmp_path):
    with quiet(tmp_path) as logger:
        logger.log(0, {"loss": 1})
    with quiet(tmp_path) as logger:
        logger.log(0, {"loss": 2})
    assert rows(tmp_path) == [{"step": 0, "loss": 2.0}]


def test_a_broken_line_in_the_middle_is_named_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\nbroken\n{"step": 2, "loss": 1.0}\n')
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        quiet(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "row",
    [b'{"step": "2"}', b'{"step": null}', b'{"step": 1.5}', b'{"step": NaN}', b'{"step": true}', b"[1]", b"[" * 100_000, b"\xff" * 5000],
    ids=lambda row: str(row[:15]),
)
def test_a_row_of_no_step_is_named(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + row + b"\n")
    with pytest.raises(ValueError, match="repair the line or move the file away") as caught:
        quiet(tmp_path, resume_step=2)
    assert str(caught.value).startswith(f"{tmp_path / 'metrics.jsonl'}:2: not a metrics row (") and len(str(caught.value)) < 500


def test_resume_step_beyond_the_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resume_step is 11"):
        quiet(tmp_path, resume_step=11)


def test_pictures_and_videos_become_files(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    with quiet(tmp_path) as logger:
        picture = logger.image(3, "val/reconstruction", frames[0])
        video = logger.video(3, "dream", frames, fps=8.0)
    assert picture == tmp_path / "media" / "val-reconstruction_00000003.png"
    assert np.array_equal(np.asarray(Image.open(picture)), frames[0])
    with av.open(video) as container:
        assert len(list(container.decode(video=0))) == 5


def test_tensorboard_holds_scalars_pictures_and_videos(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    with quiet(tmp_path, tensorboard=True) as logger:
        logger.log(1, {"loss": 0.5})
        logger.image(1, "picture", frames[0])
        logger.video(1, "dream", frames, fps=100.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5)]
    with Image.open(io.BytesIO(events.Images("dream")[0].encoded_image_string)) as gif:
        assert (gif.format, gif.n_frames) == ("GIF", 3)
    assert events.Images("picture")[0].width == 16


def test_tensorboard_is_imported_only_when_it_is_wanted(tmp_path):
    code = (
        "import sys; from dreamer.training.logging import RunLogger\n"
        f"with RunLogger({str(tmp_path)!r}, 'p', total_steps=1, tensorboard=False) as logger: logger.log(1, {{'loss': 1}})\n"
        "print('torch.utils.tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_plain_lines_come_every_ten_seconds_and_at_the_end(tmp_path):
    now, output = [0.0], io.StringIO()
    with quiet(tmp_path, total_steps=100, resume_step=20, console=Console(file=output), clock=lambda: now[0]) as logger:
        for step in range(21, 61):
            now[0] += 0.5
            logger.advance(step)
            if step == 30:
                logger.log(step, {"loss": 0.125})
    assert output.getvalue().splitlines() == [
        "phase: 40/100 (40 %), 0:00:10 passed, 0:00:30 left  loss 0.125",
        "phase: 60/100 (60 %), 0:00:20 passed, 0:00:20 left  loss 0.125",
    ]


def test_the_bar_is_drawn_on_a_terminal(tmp_path):
    output = io.StringIO()
    with quiet(tmp_path, console=Console(file=output, force_terminal=True, width=120)) as logger:
        logger.log(10, {"loss": 0.125})
    assert "10/10" in output.getvalue() and "loss 0.125" in output.getvalue()


def test_close_may_be_called_twice(tmp_path):
    logger = quiet(tmp_path)
    logger.close()
    logger.close()
