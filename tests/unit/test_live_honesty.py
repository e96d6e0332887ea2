"""What `rlhf train-rm` says at its end: the figures of the report, and no control characters of strangers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from test_honesty import duel, many, scores

from rlhf_cli.evaluation.honesty import Judged, honesty_report
from rlhf_cli.live.honesty import print_honesty


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(report: dict[str, Any], out: io.StringIO) -> str:
    print_honesty(report, out)
    return out.getvalue()


def test_every_figure_is_there_on_a_terminal_and_without_one() -> None:
    report = honesty_report(Judged(many(2).groups, many(2).scores, truncated=7, consistency=0.97))
    plain, drawn = said(report, io.StringIO()), said(report, Terminal())

    for text in (plain, drawn):
        for key in ("accuracy", "ceiling"):
            assert f"{report[key]['value']:.1%}" in text
            assert f"{report[key]['low']:.1%} to {report[key]['high']:.1%}" in text
        for when in ("before", "after"):
            assert f"{report['calibration'][when]['ece']:.1%}" in text
        assert f"{report['longer_wins']['characters']['value']:.1%}" in text
        assert f"{report['temperature']['value']:.3g}" in text
        assert f"{report['length']['correlation']:+.2f}" in text
        assert "97.0%" in text
        for row in report["by_source"] + report["by_margin"] + report["by_length"]:
            assert row["name"] in text
    assert "\x1b" not in plain
    assert all(sentence in plain for sentence in report["words"])


def test_warnings_stand_out() -> None:
    report = honesty_report(Judged([duel("p", "a", "b", 1, 0)], scores([1, 0])))
    for out in (io.StringIO(), Terminal()):
        text = " ".join(said(report, out).split())
        assert text.count("WARNING: ") == len(report["warnings"]) > 1
        assert "Only 1 held-out pairs" in text


def test_a_hostile_name_of_a_source_stays_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a name that is not folded
    nasty = "\x1b]8;;https://evil.example\x07\u202e\nforum"
    report = honesty_report(Judged([duel("p", "a", "b", 1, 0, nasty)], scores([1, 0])))
    for out in (io.StringIO(), Terminal()):
        text = said(report, out)
        assert "\u202e" not in text
        assert "\x1b]8" not in text
        assert "<U+202E>" in text
