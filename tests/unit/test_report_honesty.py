"""The report of a run shows how far to trust its reward model, and does without where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run
from test_honesty import many
from test_report import PAYLOADS, Page, report

from rlhf_cli.evaluation.honesty import Judged, honesty_report
from rlhf_cli.evaluation.verdict import read_report, rows
from rlhf_cli.journal.events import RunStarted, StageFinished, StageStarted
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.votes import VotedGroup


def judged(name: str = "source") -> dict[str, Any]:
    made = many(4, 150)
    groups = [VotedGroup(g.prompt, g.completions, g.wins, f"{name} {n % 15}") for n, g in enumerate(made.groups)]
    return honesty_report(Judged(groups, made.scores, truncated=300))


def put(folder: Path, text: str) -> Path:
    path = RunDir(folder).train_rm_report
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


def test_words_warnings_figures_and_both_plots_are_on_the_page(tmp_path: Path) -> None:
    made = judged()
    page = Page(report(put(tmp_path, json.dumps(made))))

    for text in made["words"] + made["warnings"]:
        assert text in page.text
    assert made["warnings"]
    for row in rows(made):
        assert row.name + row.value + row.interval + row.of in page.text
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    for when, label in zip(("before", "after"), labels, strict=True):
        for b in made["calibration"][when]["bins"]:
            assert f"says {b['said']:.0%}, is right {b['was']['value']:.0%}" in label
            assert f"{b['said']:.1%}{b['was']['value']:.1%}{b['was']['low']:.1%} to {b['was']['high']:.1%}" in page.text
    assert len(page.ids) == len(set(page.ids))
    assert not page.open


def test_a_run_with_no_more_than_a_reward_model_opens_with_how_good_it_is(tmp_path: Path) -> None:
    made = judged()
    with Journal.open(RunDir(tmp_path).create().journal) as journal:
        journal.append(RunStarted(run_id="r", name="n", seed=1, version="0"))
        journal.append(StageStarted(stage="train-rm", fingerprint="f"))
        journal.append(StageFinished(stage="train-rm", fingerprint="f", seconds=1.0, summary={}))
    text = Page(report(put(tmp_path, json.dumps(made)))).text
    assert f"A reward model is trained. {made['words'][0]}" in text
    assert "Not evaluated yet" not in text


def test_only_the_largest_sources_are_listed(tmp_path: Path) -> None:
    made = judged()
    assert len(made["by_source"]) == 15
    names = [row.name for row in rows(made)]
    assert sum(name.startswith("source: ") for name in names) == 13
    assert "source: the others" in names


def test_a_run_without_a_reward_model_has_no_such_section(tmp_path: Path) -> None:
    assert "Reward model" not in Page(report(make_run(tmp_path / "run").path)).text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"version": 2}', '{"version": 1}', '"<script>"', "null"]
    + [json.dumps({**judged(), key: None}) for key in ("longer_wins", "temperature", "words", "sizes")]
    + [json.dumps({**judged(), "calibration": {"before": {}, "after": {}}})],
)
def test_a_damaged_report_is_noted_and_left_out(tmp_path: Path, text: str) -> None:
    page = Page(report(put(tmp_path, text)))
    assert "train_rm/report.json cannot be read" in page.text
    assert "how far to trust it" not in page.text
    with pytest.raises(ValueError, match=r"."):
        read_report(text)


def test_hostile_names_of_sources_stay_text(tmp_path: Path) -> None:
    clean = Page(report(put(tmp_path / "clean", json.dumps(judged()))))
    nasty = judged(" ".join(PAYLOADS))
    spoiled = Page(report(put(tmp_path / "nasty", json.dumps(nasty))))
    assert spoiled.tags == clean.tags
    assert [a for a in spoiled.attributes if a[1].startswith("on")] == []
    assert "<script>alert(1)</script>" in spoiled.text
    assert "<U+202E>" in spoiled.text


def test_what_was_written_is_what_is_read() -> None:
    made = judged()
    assert read_report(json.dumps(made)) == json.loads(json.dumps(made))
