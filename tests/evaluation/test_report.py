import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from dreamer.evaluation import charts, report
from dreamer.evaluation.agent import AgentResult
from dreamer.evaluation.charts import Chart, Line, line_chart, metrics_chart
from dreamer.evaluation.intervals import Interval
from dreamer.evaluation.report import AgentClip, DreamClip, KeyFigure, Reconstructions, ReportData, ReturnRow, write_report
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS, score_open_loop

CONTEXT = 3


def moving_square(num_frames, start, step, darker=0):
    """uint8 T C H W: a bright square that moves over a textured ground."""
    ground = (np.indices((32, 32)).sum(0) % 5 * 12 + 40).astype(np.uint8)
    frames = np.stack([ground] * 3)[None].repeat(num_frames, 0)
    for t in range(num_frames):
        x = (start + step * t) % 26
        frames[t, :, 12:18, x : x + 6] = np.array([240, 200, 60], np.uint8).reshape(3, 1, 1)
    return torch.from_numpy(frames) - darker


def clips(count):
    return [
        DreamClip(
            truth=moving_square(8, i, 2),
            dreams={TRUE_ACTIONS: moving_square(8, i, 2, darker=4), SHUFFLED_ACTIONS: moving_square(8, i, 5)},
            context=CONTEXT,
            fps=8.0,
        )
        for i in range(count)
    ]


def world_model(dreams):
    def stacked(name):
        return torch.stack([clip.dreams[name][CONTEXT:] for clip in dreams])

    truth = torch.stack([clip.truth[CONTEXT:] for clip in dreams])
    copied = torch.stack([clip.truth[CONTEXT - 1 : CONTEXT].expand(5, -1, -1, -1) for clip in dreams])
    predictions = {TRUE_ACTIONS: stacked(TRUE_ACTIONS), SHUFFLED_ACTIONS: stacked(SHUFFLED_ACTIONS), COPY_LAST_FRAME: copied}
    return score_open_loop(truth, predictions | {RECONSTRUCTION: truth}, context=CONTEXT, fps=8.0, num_resamples=50)


def returns():
    rows = [("Random", "random", None, 1.0), ("Recorded players", "recorded", None, 4.0), ("Scripted player", "scripted", None, 9.0)]
    rows += [("Cloning", "bc", mode, 4.5) for mode in ("sampled", "argmax")]
    rows += [("Cloning, trained as long", "bc_long", mode, 5.0) for mode in ("sampled", "argmax")]
    rows += [("Imagination RL", "agent", mode, 7.0) for mode in ("sampled", "argmax")]
    return [ReturnRow(label, role, Interval(m, m - 0.5, m + 0.5), 100, mode, Interval(m / 10, 0.0, 1.0)) for label, role, mode, m in rows]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s, "loss": 1 / s, "return": s / 10}) + "\n" for s in range(1, 400)))
    dreams = clips(3)
    data = ReportData(
        title="A <b>bold</b> run",
        summary="Learned & dreamed.",
        notice="Smoke run.",
        dreams=dreams,
        world_model=world_model(dreams),
        action_gap=Chart("Action gap", [Line("true minus shuffled", [100, 200], [1.0, 3.0])], y_label="dB"),
        returns=returns(),
        returns_note="One unit is one log.",
        agent_clips=[AgentClip(name, moving_square(5, 0, 1).permute(0, 2, 3, 1).numpy(), 8.0) for name in ("Cloning", "Imagination RL")],
        reconstructions=Reconstructions(moving_square(4, 0, 3), moving_square(4, 0, 3, darker=4)),
        training_charts=[metrics_chart("Phase 1", metrics, {"loss": "flow loss"}, log_y=True)],
        key_figures=[KeyFigure("3.1 GB", "peak memory")],
        limits=["The arena is small."],
        command="dreamer demo --seed 0 && echo '<done>'",
        seed=0,
        hardware={"CPU": "2 cores"},
        wall_seconds={"Phase 1": 90.0, "Phase 2": 732.0},
        config={"dynamics": {"width": 64, "note": "<script>alert(1)</script>"}},
    )
    return write_report(folder / "sub" / "report.html", data).read_text()


class Collector(HTMLParser):
    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def words(html):
    return " ".join(" ".join(Collector(html).text).split())


def test_the_page_is_well_formed_and_fetches_nothing(full):
    page = Collector(full)  # asserts that tags are closed in order
    for tag, attrs in page.tags:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:")
        if tag == "img":
            assert attrs["alt"] and attrs["width"] and attrs["height"]
    assert "url(" not in full and "@import" not in full
    assert "default-src 'none'" in full


def test_strings_are_escaped(full):
    assert "<b>bold" not in full and "A &lt;b&gt;bold&lt;/b&gt; run" in full
    assert "<script>" not in full and "&lt;script&gt;alert(1)" in full
    assert "A <b>bold</b> run" in words(full)


def test_nothing_is_missing_from_a_full_page(full):
    assert "Not in this report" not in words(full)
    for text in ("Smoke run.", "One unit is one log.", "The arena is small.", "2 cores", "13 min 42 s", "Imagination RL", "3.1 GB"):
        assert text in words(full)


def test_key_figures_are_derived_from_the_results(full):
    text = words(full)
    gaps = world_model(clips(3)).psnr_gaps
    assert f"{gaps[SHUFFLED_ACTIONS].value:+.1f} dB" in text and f"{gaps[COPY_LAST_FRAME].value:+.1f} dB" in text
    assert "of the way from random to the scripted player 75 % sampled" in text  # (7 - 1) / (9 - 1)
    assert "cloning 4.50; cloning trained as long 5.00; scripted player 9.00" in text


def test_the_animation_holds_the_dream_beside_the_truth(full):
    first = next(attrs for tag, attrs in Collector(full).tags if tag == "img")
    with Image.open(io.BytesIO(base64.b64decode(first["src"].split(",")[1]))) as image:
        assert image.n_frames == 8
        frames = []
        for t in range(8):
            image.seek(t)
            frames.append(np.asarray(image.convert("RGBA")))
    clip, seen = clips(1)[0], np.stack(frames)
    assert np.array_equal(seen[:, :32, :32, :3], clip.truth.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(seen[:, :32, -32:, :3], clip.dreams[TRUE_ACTIONS].permute(0, 2, 3, 1).numpy())
    recorded, dreamed = report.BAR_RECORDED[:3], report.BAR_DREAMED[:3]
    assert [tuple(frame[-1, -32, :3]) for frame in seen] == [recorded] * CONTEXT + [dreamed] * (8 - CONTEXT)
    assert [tuple(frame[-1, 0, :3]) for frame in seen] == [recorded] * 8


def test_an_empty_report_says_what_is_missing_and_invents_nothing(tmp_path):
    text = words(write_report(tmp_path / "r.html", ReportData(title="Empty")).read_text())
    for part in (
        "a dream beside the truth",
        "key figures",
        "PSNR and SSIM",
        "returns",
        "videos",
        "reconstructions",
        "training curves",
        "limits",
    ):
        assert re.search(f"Not in this report: [^.]*{part}", text), part
    assert not re.search(r"\d", text.replace("64", ""))  # no figure without data


def test_rows_of_one_episode_have_no_interval(tmp_path):
    rows = [ReturnRow.of("Random", "random", AgentResult("random", (2.0,), (5,), (True,), (0,)))]
    text = words(write_report(tmp_path / "r.html", ReportData(title="One", returns=rows)).read_text())
    assert "Random 2.00 no interval" in text


def test_dots_and_intervals_share_one_axis():
    table = report._returns_table([ReturnRow("a", "random", Interval(0.0, -1.0, 1.0), 5), ReturnRow("b", "bc", Interval(3.0), 9)])
    a, b = table["rows"]
    assert (a["low"], a["at"], a["high"], b["at"]) == pytest.approx((2, 25.5, 49, 96))
    assert b["low"] is None and table["same_count"] is None
    assert [tick["text"] for tick in table["ticks"]] == ["-1", "0", "1", "2", "3"]


@pytest.mark.parametrize(("own", "shown", "crisp"), [(64, 256, True), (300, 300, True), (640, 308, False)])
def test_pictures_grow_by_whole_factors_and_never_beyond_their_width(own, shown, crisp):
    picture = report._picture(np.zeros((own // 2, own, 3), np.uint8), 308)
    assert (picture["width"], picture["height"], picture["crisp"]) == (shown, shown // 2, crisp)


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (59.96, "60.0 s"), (61, "1 min 01 s"), (7265, "2 h 01 min")])
def test_durations(seconds, text):
    assert report.duration(float(seconds)) == text


def test_a_chart_places_points_and_ticks_to_scale():
    svg = ElementTree.fromstring(str(line_chart(Chart("t", [Line("<a>", [0, 50, 100], [0.0, 5.0, 10.0])]))))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    assert points[0] == (charts.LEFT, charts.HEIGHT - charts.BOTTOM) and points[2] == (charts.WIDTH - charts.RIGHT, charts.TOP)
    assert points[1] == pytest.approx(((points[0][0] + points[2][0]) / 2, (points[0][1] + points[2][1]) / 2))
    assert "<a> from 0 to 10" in svg.get("aria-label")
    assert {t.text for t in svg.findall("text")} >= {"0", "2", "10", "20", "100"}


def test_a_line_keeps_its_style_where_another_is_empty():
    svg = ElementTree.fromstring(str(line_chart(Chart("t", [Line("none", [], []), Line("b", [1, 2], [1.0, 2.0])]))))
    assert [line.get("class") for line in svg.findall("polyline")] == ["line s1"]


def test_a_log_chart_is_even_in_decades():
    svg = ElementTree.fromstring(str(line_chart(Chart("t", [Line("a", [1, 2, 3], [0.01, 0.1, 1.0])], log_y=True))))
    ys = [float(p.split(",")[1]) for p in svg.find("polyline").get("points").split()]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2])


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1e-7, 1e-7], [1e6, 5e6]])
def test_charts_of_odd_ranges_are_drawn(values):
    assert "nan" not in line_chart(Chart("t", [Line("a", list(range(len(values))), values)])).lower()


@pytest.mark.parametrize(
    ("chart", "message"),
    [
        (Chart("t", []), "no line has a point"),
        (Chart("t", [Line("a", [1, 2], [1.0])]), "1 values in y, 2 in x"),
        (Chart("t", [Line("a", [1], [float("nan")])]), "y holds NaN"),
        (Chart("t", [Line("a", [1], [0.0])], log_y=True), "above 0"),
    ],
)
def test_charts_without_a_meaning_are_refused(chart, message):
    with pytest.raises(ValueError, match=message):
        line_chart(chart)


def test_long_curves_keep_their_mean_and_extremes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s % 10}) + "\n" for s in range(1200)))
    (line,) = metrics_chart("t", path, {"loss": "loss"}).lines
    assert len(line.x) == charts.MAX_POINTS and line.x[-1] == 1199
    assert set(line.y) == {4.5} and set(line.low) == {0.0} and set(line.high) == {9.0}


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        charts.read_metrics(path)
    path.write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"\['los'\]; the file has \['loss'\]"):
        metrics_chart("t", path, {"los": "loss"})
