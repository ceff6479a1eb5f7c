"""The clock, the history, the displays and the metrics file."""

import io
import math

import pytest

from pyppo import report


def row(step=100, **figures):
    return {"step": step, "time": step / 50, "sps": 50.0, "episode_return": 12.34, "approx_kl": 0.01,
            "clip_fraction": 0.125, **figures}  # fmt: skip


def test_clock_counts_inner_phases_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    def work(seconds):
        now[0] += seconds

    clock = report.Clock()
    clock.start()
    with clock.phase("env"):
        work(2.0)
        with clock.phase("act"):
            work(3.0)
        work(1.0)
    work(0.5)
    assert clock.lap() == {"act": 3.0, "env": 3.0, "gae": 0.0, "update": 0.0, "other": 0.5}
    assert clock.total == 6.5
    assert set(clock.lap().values()) == {0.0}


def test_history_scores_the_last_hundred_episodes():
    history = report.History()
    first = history.add({"step": 1}, [], {"loss": 0.5})
    assert math.isnan(first["episode_return"])
    second = history.add({"step": 2}, [(float(i), i) for i in range(150)], {"loss": 0.25})
    assert second["episode_return"] == sum(range(50, 150)) / 100
    assert (second["episodes"], second["episodes_total"]) == (150, 150)
    assert history["loss"] == [0.5, 0.25]
    again = report.History()
    again.load_state_dict(history.state_dict())
    assert again.add({"step": 3}, [], {})["episode_return"] == second["episode_return"]


def test_plain_lines_say_everything_at_an_interval():
    stream = io.StringIO()
    lines = report.LineReporter(1_000, stream, interval=1e9)
    for step in (100, 200, 300):
        lines.update(row(step))
    lines.close()
    first, last = stream.getvalue().splitlines()
    assert "steps 100 | done 10% | steps/s 50 | return 12.3 | KL 0.0100 | clipped 12.5% | left 0:18" in first
    assert last.startswith("steps 300")


def test_unknown_figures_are_dashes():
    stream = io.StringIO()
    report.LineReporter(1_000, stream).update(row(episode_return=math.nan, sps=0.0))
    assert "steps/s 0 | return - " in stream.getvalue()
    assert "left -" in stream.getvalue()


def test_the_live_display_renders():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    live = report.make_reporter(1_000, stream=stream)
    assert isinstance(live, report.LiveReporter)
    live.update(row(500))
    live.message("saved [somewhere]")
    live.close()
    shown = stream.getvalue()
    assert "50%" in shown
    assert "12.5%" in shown
    assert "saved [somewhere]" in shown


def test_which_reporter():
    stream = io.StringIO()
    assert type(report.make_reporter(1, stream=stream)) is report.LineReporter
    quiet = report.make_reporter(1, quiet=True, stream=stream)
    quiet.update(row())
    quiet.close()
    assert stream.getvalue() == ""
    quiet.message("hello")
    assert stream.getvalue() == "hello\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3_725, "1:02:05"), (math.inf, "-"), (math.nan, "-")]
)
def test_durations(seconds, text):
    assert report._duration(seconds) == text


def test_metrics_survive_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = report.MetricsFile(path)
    metrics(row(1, loss=math.nan))
    metrics(row(2, loss=math.inf))
    metrics(row(3, loss=1.5))
    metrics.close()
    assert "NaN" not in path.read_text()
    columns = report.read_metrics(path)
    assert columns["step"] == [1, 2, 3]
    assert math.isnan(columns["loss"][0])
    assert columns["loss"][2] == 1.5
    report.rewrite_metrics(path, report.read_metrics(path, last_step=2))
    assert report.read_metrics(path)["step"] == [1, 2]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert report.read_metrics(path)["step"] == [1]
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        report.read_metrics(path)
    for line in ("[1, 2]", '{"loss": 1}', "7"):
        path.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(ValueError, match="line 2, is no row with a step"):
            report.read_metrics(path)


def test_tensorboard_gets_each_finite_figure(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = report.TensorBoard(tmp_path)
    board(row(5, loss=math.nan))
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("episode_return")
    assert (event.step, event.value) == (5, pytest.approx(12.34))
    assert "loss" not in events.Tags()["scalars"]
