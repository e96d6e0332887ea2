"""Watching a run never disturbs it, and never obeys what a model wrote."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_cli.journal.events import (
    CompletionRecord,
    Event,
    FlowOpened,
    GroupRanked,
    GroupSampled,
    RolledBack,
    RunStopped,
    StageFinished,
    StageStarted,
    StepTrained,
)
from rlhf_cli.live.dashboard import Dashboard
from rlhf_cli.live.jsonl import JsonLines
from rlhf_cli.live.open import animates, open_display
from rlhf_cli.live.panel import Seen, noise, panel, sparkline
from rlhf_cli.live.plain import PlainLines
from rlhf_cli.live.results import print_results, results_table
from rlhf_cli.text import one_line, visible

ROW = {
    "reward/mean": 1.53,
    "kl/sequence_nats": 0.8,
    "flow/votes_step": 96.0,
    "flow/votes_total": 288.0,
    "flow/latency_p50_s": 2.1,
    "flow/latency_p95_s": 7.8,
    "staleness/mean_steps": 1.2,
    "time/step_s": 8.2,
    "time/generate_s": 4.1,
    "time/train_s": 3.0,
    "cost/usd": 1.2,
}
HOSTILE = "\x1b[31mred\x1b]8;;x\x07 [bold]markup[/bold] \u202eltr\r\nnext \x9b2J"
OPENED = FlowOpened(
    flow_id="f",
    service="embedded",
    fingerprint="x",
    instruction="?",
    min_votes=8,
    desired_votes=12,
    max_votes=16,
    ttl_s=300,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ranked(votes: float) -> GroupRanked:
    return GroupRanked(group_id="g", source="item:1", wins=((0, votes), (0, 0)), latency_s=1, complete=True)


def seen_run() -> Seen:
    seen = Seen("a title")
    events: list[Event] = [StageStarted(stage="run-online", fingerprint="f"), OPENED, ranked(10), ranked(14)]
    for event in events:
        seen.event(event)
    seen.status({"run/steps_total": 16, "kl/soft_nats": 8, "kl/hard_nats": 20, "flow/in_flight": 6})
    for step in range(1, 4):
        seen.metrics(step, {**ROW, "reward/mean": 1.0 + step / 10})
    return seen


def plain(*told: Event) -> tuple[PlainLines, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    display = PlainLines(out, clock)
    for event in told:
        display.on_event(event)
    return display, out, clock


def test_plain_mode_writes_one_line_a_step() -> None:
    display, out, _ = plain()
    display.on_status({"run/steps_total": 16})
    display.on_metrics(3, ROW)

    assert out.getvalue() == (
        "step=3/16 reward=1.530 kl=0.80 votes=96 votes_total=288 latency_p95_s=7.8 staleness=1.2 step_s=8.2 usd=1.20\n"
    )


def test_a_service_that_does_not_answer_is_shown_until_it_does() -> None:
    seen = seen_run()
    seen.status({"flow/circuit_open": 1.0, "flow/unreachable_s": 34.2})
    assert "service unreachable for 34 s, asking again" in [line.plain for line in panel(seen, 100)]
    seen.status({"flow/circuit_open": 0.0, "flow/unreachable_s": 0.0})
    assert not any("unreachable" in line.plain for line in panel(seen, 100))

    display, out, clock = plain()
    for open_for_s in (34.2, 0.0):
        clock.now += 31
        display.on_status({"flow/in_flight": 3, "flow/unreachable_s": open_for_s})
    assert out.getvalue() == "waiting step=1 in_flight=3 unreachable_s=34\nwaiting step=1 in_flight=3\n"


def test_plain_mode_tells_stages_notes_and_the_end() -> None:
    display, out, _ = plain(
        StageStarted(stage="sft", fingerprint="f"),
        StageFinished(stage="sft", fingerprint="f", seconds=12, summary={"loss": 1.25, "judge": "crowd", "kl": None}),
        StageStarted(stage="run-online", fingerprint="f", resumed_from_step=5),
        ranked(3),
        RunStopped(exit_code=6, reason="budget reached"),
    )
    display.on_note(HOSTILE)

    assert out.getvalue().splitlines() == [
        "stage=sft started",
        "stage=sft done seconds=12.0 loss=1.25 judge=crowd",
        "stage=run-online resumed from_step=5",
        "stopped exit_code=6 reason=budget reached",
        "note: " + one_line(HOSTILE),
    ]


def test_plain_mode_reports_progress_at_most_every_ten_seconds_and_at_the_end() -> None:
    display, out, clock = plain()
    for done in range(101):
        clock.now = done / 4
        display.on_progress("answering", done, 100)

    assert out.getvalue().splitlines() == [
        "answering: 0/100",
        "answering: 40/100",
        "answering: 80/100",
        "answering: 100/100",
    ]


def test_plain_mode_has_a_heartbeat_only_when_nothing_was_said_for_thirty_seconds() -> None:
    display, out, clock = plain()
    for second in range(100):
        clock.now = second
        if second == 40:
            display.on_metrics(1, {})
        display.on_status({"flow/in_flight": 48.0})

    assert out.getvalue().splitlines() == [
        "waiting step=1 in_flight=48",
        "step=1",
        "waiting step=2 in_flight=48",
    ]


def test_jsonl_mode_writes_one_ascii_object_a_line_and_keeps_token_ids_out() -> None:
    out = io.StringIO()
    display = JsonLines(out)
    record = CompletionRecord(text=HOSTILE, token_ids=(1, 2), logps="", ref_logps="", ended=True)
    display.on_event(
        GroupSampled(
            group_id="g", index=0, prompt_id="p", messages=(), prompt_ids=(1,), completions=(record,), policy_step=0
        )
    )
    display.on_metrics(1, ROW)
    display.on_status({"flow/in_flight": 1})
    display.on_progress("load", 1, None)
    display.on_note(HOSTILE)

    assert out.getvalue().isascii()
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [row["kind"] for row in rows] == ["event", "metrics", "status", "progress", "note"]
    assert rows[0]["event"]["completions"] == [{"text": HOSTILE, "ended": True, "role": ""}]
    assert rows[1]["reward/mean"] == 1.53


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    code = (
        "import os, sys; from rlhf_cli.live.plain import PlainLines\n"
        "read_end, write_end = os.pipe(); os.close(read_end)\n"
        "display = PlainLines(os.fdopen(write_end, 'w'))\n"
        "for step in range(3): display.on_metrics(step, {})\n"
        "print('done', flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "done\n"


@pytest.mark.parametrize(
    ("environ", "terminal", "height", "expected"),
    [
        ({"TERM": "xterm"}, True, 24, True),
        ({"TERM": "xterm"}, False, 24, False),
        ({"TERM": "xterm", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}, False, 24, False),
        ({"TERM": "dumb"}, True, 24, False),
        ({"TERM": "xterm", "CI": "true"}, True, 24, False),
        ({"TERM": "xterm"}, True, 14, False),
    ],
)
def test_text_moves_only_where_a_person_watches(
    environ: dict[str, str], terminal: bool, height: int, expected: bool
) -> None:
    assert animates(environ, terminal, height) is expected


def test_auto_is_plain_when_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display("auto", "title") as display:
        display.on_note("hello")

    assert capsys.readouterr() == ("", "note: hello\n")


def test_the_panel_shows_the_figures_that_matter() -> None:
    text = "\n".join(line.plain for line in panel(seen_run(), 80))

    for figure in ("step 3/16", "1.300", "from 1.100", "noise", "0.80 nats", "soft 8", "hard 20", "12.0 a group"):
        assert figure in text
    for figure in ("min 8 \u00b7 desired 12 \u00b7 max 16", "288 total", "6 in flight", "p50 2.1 s", "p95 7.8 s"):
        assert figure in text
    for figure in ("1.2 steps", "8.2 s", "generate 4.1", "train 3.0", "$1.20"):
        assert figure in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_panel_fits_every_pane(width: int) -> None:
    assert all(line.cell_len <= width for line in panel(seen_run(), width))


def test_before_the_first_step_only_the_head_is_there() -> None:
    assert len(panel(Seen("title"), 80)) == 1


def test_supervised_stages_show_their_own_loss_and_eval_leaves_the_steps_of_the_run() -> None:
    seen = Seen("demo")

    def picture() -> str:
        return "\n".join(line.plain for line in panel(seen, 120))

    seen.event(StageStarted(stage="sft", fingerprint="f"))
    seen.metrics(9, {"sft/loss": 2.5, "sft/tokens_per_s": 1500.0})
    assert "2.500 nats" in picture()
    assert "1,500 tokens/s" in picture()
    seen.event(StageStarted(stage="train-rm", fingerprint="f"))
    assert "2.500" not in picture()
    seen.metrics(3, {"train_rm/loss": 0.61, "train_rm/accuracy": 0.75})
    assert "0.610 nats  accuracy 75.0%" in picture()
    assert "step 3" in picture()
    seen.event(StageFinished(stage="train-rm", fingerprint="f", seconds=1.0))
    assert "step" not in picture()
    assert "not measured yet" not in picture()
    seen.event(StageStarted(stage="run-online", fingerprint="f"))
    seen.status({"run/steps_total": 8.0})
    assert "step 0/8" in picture()
    seen.metrics(8, ROW)
    seen.event(StageStarted(stage="eval", fingerprint="f"))
    assert "eval  step 8/8" in picture()


def test_plain_mode_says_how_the_reward_model_is_doing() -> None:
    out = io.StringIO()
    PlainLines(out).on_metrics(3, {"train_rm/loss": 0.61, "train_rm/accuracy": 0.75, "train_rm/step_s": 1.04})
    assert out.getvalue() == "step=3 loss=0.6100 accuracy=0.750 step_s=1.0\n"


def test_agreement_of_model_and_people_is_shown_where_both_answer() -> None:
    seen, figures = seen_run(), {"rm/version": 3.0, "rm/agreement": 0.714, "rm/heldout_accuracy": 0.8}
    assert not any(line.plain.startswith("model") for line in panel(seen, 100))
    seen.status(figures)
    assert "model   version 3 \u00b7 agrees with 71% of people's votes \u00b7 80% held out" in [
        line.plain for line in panel(seen, 100)
    ]
    out = io.StringIO()
    PlainLines(out).on_metrics(3, figures)
    assert out.getvalue() == "step=3 rm_version=3 rm_agreement=0.714\n"


def test_whom_people_see_what_drifts_and_how_the_learner_does_is_shown_where_it_is_known() -> None:
    seen = seen_run()
    seen.status({"selection/people_frac": 0.25, "selection/random_total": 3.0})
    seen.status({"drift/z_max": 1.24, "drift/cluster_worst": 2.0, "drift/rounds_total": 1.0, "drift/round_groups": 5.0})
    seen.metrics(4, {"train/accuracy": 0.617, "train/beta": 0.2})
    lines = [line.plain for line in panel(seen, 100)]
    assert "select  people see 25% of groups \u00b7 3 drawn at random" in lines
    assert (
        "drift   1.2 standard errors at most \u00b7 in cluster 2 \u00b7 1 targeted rounds \u00b7 5 groups to come"
        in lines
    )
    assert "learner agrees with 62% of the votes \u00b7 beta 0.200" in lines


def test_a_reward_at_equal_length_of_an_earlier_step_is_not_shown_beside_a_later_reward() -> None:
    seen = seen_run()
    seen.metrics(4, {"reward/mean": 1.0, "reward/length_controlled": 0.5})
    assert "0.500 at equal length" in "\n".join(line.plain for line in panel(seen, 100))
    seen.metrics(5, {"reward/mean": 2.0})
    assert "at equal length" not in "\n".join(line.plain for line in panel(seen, 100))


def test_how_far_a_judge_contradicts_itself_is_shown_where_one_compares() -> None:
    seen = seen_run()
    assert not any(line.plain.startswith("judge") for line in panel(seen, 100))
    seen.status({"judge/position_bias": 0.031, "judge/inconsistent_frac": 0.25, "judge/requests_total": 9.0})
    assert "judge   position bias +3.1% \u00b7 25% of pairs contradict" in [line.plain for line in panel(seen, 100)]


def test_votes_that_a_model_made_up_are_not_counted_as_peoples() -> None:
    seen = seen_run()
    before = list(seen.ranked)
    seen.event(ranked(3).model_copy(update={"source": "reward_model:v2"}))
    assert seen.ranked == before
    seen.event(ranked(3))
    assert len(seen.ranked) == len(before) + 1


def test_votes_of_a_trained_step_no_longer_count_for_the_next() -> None:
    seen = seen_run()
    seen.event(StepTrained(step=4, group_ids=()))
    seen.event(ranked(9))

    assert "9.0 a group" in "\n".join(line.plain for line in panel(seen, 80))


def test_sparklines_and_noise_by_hand() -> None:
    assert sparkline([0, 1, 2, 7], 10) == "\u2581\u2582\u2583\u2588"
    assert sparkline([0, 0, 7, 7], 2) == "\u2581\u2588"
    assert sparkline([3, 3], 10) == "\u2581\u2581"
    assert sparkline([], 10) == ""
    assert noise([0, 1, 0]) == pytest.approx(0.5**0.5)
    assert noise([0, 1]) is None


def test_the_dashboard_never_hides_the_cursor_for_good_and_obeys_no_model_text() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)
    with Dashboard(HOSTILE, console) as dashboard:
        dashboard.on_event(OPENED)
        dashboard.on_progress(HOSTILE, 1, 2)
        dashboard.on_metrics(1, ROW)
        dashboard.on_note(HOSTILE)
        dashboard.on_progress(HOSTILE, 2, 2)
        assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1
    text = out.getvalue()

    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    assert "\u202e" not in text
    assert "\x1b]8" not in text
    assert "\x9b" not in text
    assert "[bold]markup[/bold]" in text


@pytest.mark.parametrize("output", ["live", "plain", "jsonl"])
def test_nothing_of_the_display_goes_to_stdout(output: str) -> None:
    code = (
        "import sys; from rlhf_cli.live.open import open_display\n"
        "with open_display(sys.argv[1], 't') as d: d.on_note('hello'); print('result')"
    )
    done = subprocess.run([sys.executable, "-c", code, output], capture_output=True, text=True, check=True)

    assert done.stdout == "result\n"
    assert "hello" in done.stderr


def test_live_and_report_start_without_torch() -> None:
    code = (
        "import sys, rlhf_cli.live.open, rlhf_cli.live.dashboard, rlhf_cli.live.results, rlhf_cli.ranking.intervals\n"
        "print({'torch', 'transformers', 'trl', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


RESULT = {
    "win_rate": 0.625,
    "win_rate_low": 0.551,
    "win_rate_high": 0.69,
    "judge": "crowd",
    "prompts": 64,
    "reward_before": 0.412,
    "reward_after": 1.53,
    "reward_gain": 1.118,
    "reward_gain_low": 0.9,
    "reward_gain_high": 1.3,
    "kl_sequence_nats": 3.21,
    "kl_token_nats": None,
    "votes": 1536,
    "cost_usd": 6.1,
    "seconds": 173.0,
    "gates": {"win_rate": {"value": 0.625, "limit": 0.7, "passed": False}},
    "report": "runs/x/report.html",
}


def test_results_are_plain_lines_in_a_pipe(tmp_path: Path) -> None:
    out = io.StringIO()
    print_results(RESULT, out)

    assert out.getvalue().splitlines() == [
        "win rate: 62.5% (95%: 55.1% to 69.0%) judged by crowd, 64 held-out prompts",
        "reward: 0.412 \u2192 1.530  gain +1.118 (95%: +0.900 to +1.300)",
        "KL: 3.21 nats a completion",
        "votes used: 1,536",
        "cost: $6.10",
        "time: 173 s",
        "gate win_rate: FAILED: 0.625 against 0.7",
        "report: runs/x/report.html",
    ]


def test_results_without_figures_are_an_empty_table() -> None:
    assert results_table({}).row_count == 0


def test_hidden_characters_are_named() -> None:
    assert visible("a\x1b[0m\u202eb\tc\nd\x7f\u200b") == "a\u241b[0m<U+202E>b\tc\nd\u2421<U+200B>"
    assert one_line("a\tb\nc") == "a\u2409b\u240ac"
    assert visible("na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645") == (
        "na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    )


def test_after_a_roll_back_the_steps_that_were_given_up_are_gone_from_the_picture() -> None:
    seen = Seen("run")
    seen.event(StageStarted(stage="run-online", fingerprint="f"))
    for step in range(1, 5):
        seen.metrics(step, {"reward/mean": float(step), "kl/sequence_nats": 10.0 * step, "length/mean_chars": 40.0})
    seen.event(RolledBack(guard="kl", value=40, limit=30, from_step=4, to_step=2, checkpoint=None, beta_scale=2))
    assert (seen.step, sorted(seen.reward), sorted(seen.kl)) == (2, [1, 2], [1, 2])
    text = "\n".join(line.plain for line in panel(seen, 100))
    assert "20.00 nats  rolled back" in text
    assert "40 characters" in text
