"""The report repeats the run's own numbers, works on any run, and treats model text as text."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import RECIPE, make_run

from rlhf_cli.errors import UsageError
from rlhf_cli.journal.events import (
    GuardTripped,
    RolledBack,
    RunStarted,
    RunStopped,
    StageFinished,
    StageStarted,
    StepTrained,
)
from rlhf_cli.journal.journal import Journal, read
from rlhf_cli.journal.metrics import METRICS, MetricsWriter, read_metrics
from rlhf_cli.journal.replay import RunState, replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.fingerprint import Stage
from rlhf_cli.report.build import build_report
from rlhf_cli.report.guards import ages_section
from rlhf_cli.report.plots import CHARTS, smooth
from rlhf_cli.report.record import load

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</pre></main><iframe src=//evil.example>",
    "</style></title><meta http-equiv=refresh content=0>",
    "\u202egnirts desrever\u202c",
    "\x1b[31mred\x1b]8;;https://evil.example\x07link\x1b[0m",
    "[x](https://evil.example) ![](http://169.254.169.254/)",
    "&lt;b&gt; &#60;script&#62;",
    "$title ${body} {braces} %s",
)
VOID = {"meta", "br", "path", "use", "img"}


class Page(HTMLParser):
    """Reads a page as a browser would: which elements are there, and what text they hold."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def spoil(text: str) -> str:
    return f"{text} {' '.join(PAYLOADS)}"


def report(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def rows_of(markup: str, title: str) -> list[list[str]]:
    """The table under the chart called `title`."""
    figure = next(f for f in re.findall(r"<figure.*?</figure>", markup, re.DOTALL) if f"<h3>{title}</h3>" in f)
    rows = re.findall(r"<tr>(.*?)</tr>", figure[figure.index("<details") :])
    return [[html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in rows][1:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "kind").path


def test_every_number_in_the_tables_is_the_one_in_the_metrics(finished: Path) -> None:
    markup = report(finished)
    metrics = read_metrics(finished / "metrics.jsonl")
    for chart in CHARTS:
        names = [name for name in chart.names if any(name in row for row in metrics)]
        if chart.names[0] not in names:  # what the learner of this run does not measure
            assert f"<h3>{chart.title}</h3>" not in markup
            assert chart.title.lower() in Page(markup).text[Page(markup).text.index("Not measured in this run: ") :]
            continue
        expected = [[str(row["step"]), *(format(row[name], METRICS[name].form) for name in names)] for row in metrics]

        assert rows_of(markup, chart.title) == expected


def test_the_verdict_comes_first_and_says_what_the_evaluation_says(finished: Path) -> None:
    results = json.loads((finished / "eval" / "results.json").read_text())
    text = Page(report(finished)).text
    verdict = text[: text.index("Training")]

    for name in ("win_rate", "win_rate_low", "win_rate_high"):
        assert f"{results[name]:.1%}" in verdict
    for name in ("reward_before", "reward_after", "reward_gain", "reward_gain_low", "reward_gain_high"):
        assert f"{results[name]:.3f}" in verdict
    assert "preferred" in verdict
    assert "gate kl_nats_max failed: 9.871 against 8" in verdict
    for name, value in results.items():
        assert name in text
        assert str(value) in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.51, 0.7, "preferred"), (0.45, 0.7, "no clear difference"), (0.2, 0.49, "worse")],
)
def test_the_verdict_claims_no_more_than_its_interval(tmp_path: Path, low: float, high: float, said: str) -> None:
    results = tmp_path / "eval" / "results.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"win_rate": (low + high) / 2, "win_rate_low": low, "win_rate_high": high}))

    assert said in Page(report(tmp_path)).text


def test_what_happened_to_every_group_is_counted(finished: Path) -> None:
    groups = replay(read(finished / "journal.jsonl")).groups.values()
    text = Page(report(finished)).text
    aside = [g.set_aside for g in groups if g.set_aside]

    assert f"sampled{len(groups)}" in text
    assert f"trained on{sum(g.step is not None for g in groups)}" in text
    assert aside
    for reason in set(aside):
        assert f"set aside: {reason}{aside.count(reason)}" in text


def test_recipe_and_provenance_are_there(finished: Path) -> None:
    text = Page(report(finished)).text

    assert RECIPE in text
    for fact in ("kind-everyday-5f3a", "flow-81c2 at embedded", "numpy 2", "Which answer is kinder?"):
        assert fact in text


def test_samples_stand_side_by_side(finished: Path) -> None:
    text = Page(report(finished)).text
    for line in (finished / "samples" / "heldout.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sample["prompt"] in text
        for answer in sample["before"] + sample["after"]:
            assert answer["text"] in text
            assert f"reward {answer['reward']:.2f}" in text


def test_hostile_text_stays_text(tmp_path: Path, finished: Path) -> None:
    hostile = report(make_run(tmp_path / "run", spoil=spoil).path)
    clean, spoiled = Page(report(finished)), Page(hostile)

    assert spoiled.tags == clean.tags
    assert [a for a in spoiled.attributes if a[1].startswith("on")] == []
    for payload in PAYLOADS[:6] + PAYLOADS[8:]:
        assert payload in spoiled.text
    assert "<U+202E>gnirts desrever<U+202C>" in spoiled.text
    assert "\u241b[31mred" in spoiled.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", hostile)


def test_the_page_runs_nothing_and_fetches_nothing(finished: Path) -> None:
    markup = report(finished)
    page = Page(markup)

    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert "http:" not in markup
    assert "https:" not in markup
    assert "default-src 'none'" in markup[: markup.index("<title>")]
    for tag, name, value in page.attributes:
        if name in {"href", "xlink:href", "src"} or "url(" in value:
            assert re.match(r"#|url\(#", value), (tag, name, value)


def test_the_markup_is_closed_and_ids_are_unique(finished: Path) -> None:
    page = Page(report(finished))

    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_the_same_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    first = build_report(finished, tmp_path / "a.html").read_bytes()

    assert build_report(finished, tmp_path / "b.html").read_bytes() == first


def test_two_hundred_steps_stay_below_two_megabytes(tmp_path: Path) -> None:
    assert build_report(make_run(tmp_path / "run", steps=200).path).stat().st_size < 2_000_000


def test_an_empty_folder_has_a_report_that_says_what_is_missing(tmp_path: Path) -> None:
    text = Page(report(tmp_path)).text

    for said in ("a run that has not begun", "Not evaluated yet", "No step has been trained yet", "No recipe.yaml yet"):
        assert said in text


@pytest.mark.parametrize(
    ("stage", "summary", "said"),
    [
        ("sft", {"heldout_loss_before": 3.5, "heldout_loss": 1.25}, "held-out loss from 3.500 to 1.250 nats per token"),
        ("sft", {"loss": 1.25}, "Nothing was held out"),
        ("train-rm", {"loss": 0.5}, "nothing says how far to trust it"),
    ],
)
def test_a_run_that_only_supervises_is_not_told_to_evaluate(
    tmp_path: Path, stage: Stage, summary: dict[str, float | str | None], said: str
) -> None:
    run = RunDir(tmp_path).create()
    with Journal.open(run.journal) as journal:
        journal.append(RunStarted(run_id="r", name="n", seed=1, version="0"))
        journal.append(StageStarted(stage=stage, fingerprint="f"))
        journal.append(StageFinished(stage=stage, fingerprint="f", seconds=1.0, summary=summary))
    text = Page(report(tmp_path)).text

    assert said in text
    assert "Not evaluated yet" not in text


def test_a_killed_run_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", end=False)
    with run.journal.open("ab") as out:
        out.write(b'{"crc":"01')
    journal, metrics = run.journal.read_bytes(), run.metrics.read_bytes()
    text = Page(report(run.path)).text

    assert "in run-online: still running, or killed there" in text
    assert "Not evaluated yet" in text
    assert (run.journal.read_bytes(), run.metrics.read_bytes()) == (journal, metrics)  # only looked at


def test_the_head_says_how_it_ended(tmp_path: Path, finished: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, end=False)
    with Journal.open(run.journal) as journal:
        journal.append(RunStopped(exit_code=6, reason="budget.votes is used up\nrlhf resume"))

    assert "exit code 6: budget.votes is used up" in Page(report(run.path)).text
    assert "kind-everydayfinished" in Page(report(finished)).text


def test_a_resume_is_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=6, end=False)
    again = replay(read(run.journal)).steps[6]
    with Journal.open(run.journal) as journal:
        journal.append(StageStarted(stage="run-online", fingerprint="online", resumed_from_step=5))
        journal.append(StepTrained(step=6, group_ids=again.group_ids))

    assert "picked up again after step 5" in Page(report(run.path)).text


def test_damage_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.journal.write_bytes(run.journal.read_bytes().replace(b"item-g00003", b"item-g00004"))
    run.heldout_samples.write_text('{"prompt": ')
    run.eval_results.write_text("[1]")
    text = Page(report(run.path)).text

    assert "The journal cannot be trusted" in text
    assert "heldout.jsonl cannot be read" in text
    assert "results.json cannot be read (not an object)" in text
    assert "Agreement with the votes" in text


def test_gaps_in_the_metrics_are_gaps(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.append(1, {"kl/sequence_nats": 1.0})
    writer.append(2, {"kl/sequence_nats": float("nan")})
    markup = report(tmp_path)

    assert rows_of(markup, "Distance from the reference") == [["1", "1.00"], ["2", "\u2013"]]
    assert "Not measured in this run: reward, votes" in Page(markup).text


def test_very_long_runs_have_thinned_tables_that_say_so(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in range(1, 1001):
        writer.append(step, {"reward/mean": step / 10})
    markup = report(tmp_path)

    assert [row[0] for row in rows_of(markup, "Reward")[:3]] == ["1", "4", "7"]
    assert "Every 3th step" not in markup
    assert "One step in 3; all of them are in metrics.jsonl." in markup


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run folder"):
        build_report(tmp_path / "nothing")


def test_smoothing_keeps_both_ends() -> None:
    assert smooth([0, 3, 6, 0, 3]) == [0, 3, pytest.approx(2.4), 3, 3]


def test_the_report_tells_what_guards_did_and_how_old_the_votes_were(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=6)
    with Journal.open(run.journal) as journal:
        journal.append(GuardTripped(guard="length_growth", step=4, value=2.123, limit=2, action="note"))
        journal.append(
            RolledBack(guard="kl", value=21.5, limit=20, from_step=6, to_step=3, checkpoint=None, beta_scale=2)
        )
    page = Page(build_report(tmp_path).read_text())
    assert "noted" in page.text
    assert "Red lines: rolled back to step 3" in page.text
    assert "2.12" in page.text
    assert "rolled back to step 3, beta 2 times the recipe's from there on" in page.text
    state = replay(read(run.journal))
    assert sorted(state.steps) == [1, 2, 3]
    trained = [group for group in state.groups.values() if group.step is not None]
    oldest = max(group.step - 1 - group.sampled.policy_step for group in trained if group.step is not None)
    ages = page.text[page.text.index("Age of every trained vote") :]
    assert re.search(rf"share of votes(.*\D)?{oldest}\d", ages)


def test_what_a_model_expected_of_people_is_not_counted_as_their_votes(tmp_path: Path) -> None:
    record = load(make_run(tmp_path, steps=4))
    votes = sum(group.ranked.matrix().votes for group in record.trained if group.ranked)
    assert f"<td>{votes:,.0f}</td>" in ages_section(replace(record, state=_one_age(record.state)))
    first = record.trained[0]
    assert first.ranked is not None
    by_model = replace(first, ranked=first.ranked.model_copy(update={"source": "reward_model:v1"}))
    record.state.groups[first.sampled.group_id] = by_model
    fewer = votes - first.ranked.matrix().votes
    assert f"<td>{fewer:,.0f}</td>" in ages_section(replace(record, state=_one_age(record.state)))
    for name, group in record.state.groups.items():
        if group.ranked is not None:
            by_model = replace(group, ranked=group.ranked.model_copy(update={"source": "reward_model:v1"}))
            record.state.groups[name] = by_model
    assert "votes of people" not in ages_section(record)


def _one_age(state: RunState) -> RunState:
    """The same with every group sampled at the step before the one that trained on it."""
    groups = {
        name: replace(g, sampled=g.sampled.model_copy(update={"policy_step": (g.step or 1) - 1}))
        for name, g in state.groups.items()
    }
    return replace(state, groups=groups)


def test_a_run_in_which_no_guard_tripped_has_no_word_about_them(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    assert "Limits of the recipe" not in Page(build_report(tmp_path).read_text()).text
