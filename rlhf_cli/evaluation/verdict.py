"""The honesty report in words, and what makes a reward model untrustworthy."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

FEW_PAIRS = 100
HIGH_ECE = 0.05
WIDE_TEMPERATURE = 4.0
HIGH_LENGTH_CORRELATION = 0.5
LOW_CONSISTENCY = 0.9
MANY_TRUNCATED = 0.1

VERSION = 1
MOST_KINDS = 12

Report = dict[str, Any]


def read_report(text: str) -> Report:
    """A report from its file, with everything in it that words, table and plot need.

    Raises:
        ValueError: It is no report, or of another version of rlhf.
    """
    report = json.loads(text)
    try:
        if report["version"] != VERSION:
            raise ValueError(f"it has version {report['version']}, this rlhf reads {VERSION}")
        rows(report)
        for measured in (report["calibration"] or {}).values():
            confidence(measured)
            [b["was"][bound] + b["said"] for b in measured["bins"] for bound in ("low", "high")]
        if not all(isinstance(text, str) for text in [*report["words"], *report["warnings"]]):
            raise TypeError("words that are no text")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the report of a reward model: {error!r}") from error
    return dict(report)


def verdict(report: Report) -> list[str]:
    """What a person would say of the figures, one sentence each."""
    accuracy, ceiling = report["accuracy"], report["ceiling"]
    if accuracy is None:
        return ["No held-out pair has a majority, so nothing can be said about the accuracy."]
    longer = report["longer_wins"]["characters"]
    said = [
        f"On {accuracy['pairs']:,} held-out pairs it prefers what most raters prefer {share(accuracy)}; "
        f"always taking the longer one does so {percent(longer['value'])} of the time."
    ]
    if ceiling is not None:
        same = ceiling["accuracy_on_the_same"]
        beside = f"; on such pairs the model has {percent(same['value'])}" if same else ""
        said.append(f"Half of the raters predict the other half {share(ceiling)}{beside}.")
    if report["calibration"] is not None:
        temperature = report["temperature"]["value"]
        said.append("As trained, " + confidence(report["calibration"]["before"]))
        said.append(f"At temperature {temperature:.3g}, " + confidence(report["calibration"]["after"]))
    length = report["length"]
    if length["correlation"] is not None:
        beside = length["correlation_of_votes"]
        votes = "" if beside is None else f"; that of the votes with length is {beside:+.2f}"
        said.append(f"Within a prompt its rewards correlate with length at {length['correlation']:+.2f}{votes}.")
    return said


def confidence(measured: Report) -> str:
    """Whether probabilities promise too much or too little, with the bin that shows it best."""
    excess = measured["excess"]
    if excess["low"] <= 0 <= excess["high"]:
        return (
            "it is neither over- nor under-confident as far as "
            f"{measured['votes']:,.0f} votes can tell: it says {percent(excess['value'] + right(measured))} on average "
            f"and is right {percent(right(measured))} of the time."
        )
    over = excess["value"] > 0
    worst = max(measured["bins"], key=lambda b: (b["said"] - b["was"]["value"]) * b["votes"] * (1 if over else -1))
    word = "over" if over else "under"
    return (
        f"it is {word}-confident: where it says {percent(worst['said'])}, it is right {percent(worst['was']['value'])} "
        "of the time."
    )


def right(measured: Report) -> float:
    """Share of the votes that went the model's way."""
    return float(sum(b["votes"] * b["was"]["value"] for b in measured["bins"]) / measured["votes"])


def warnings(report: Report) -> list[str]:
    """Why not to trust the model, or not these figures; each says what to do."""
    accuracy, longer, sizes = report["accuracy"], report["longer_wins"]["characters"], report["sizes"]
    temperature, calibration, length = report["temperature"], report["calibration"], report["length"]
    found = []
    pairs = accuracy["pairs"] if accuracy else 0
    if pairs < FEW_PAIRS:
        found.append(
            f"Only {pairs} held-out pairs have a majority: the figures are too uncertain to rely on. Hold out at least "
            f"{FEW_PAIRS}, better a thousand."
        )
    if accuracy:
        rule, name = longer["value"], "longer"
        if rule < 0.5:
            rule, name = 1 - rule, "shorter"
        if accuracy["low"] <= 0.5:
            found.append("It may be no better than chance: its accuracy is not surely above 50%. Do not train on it.")
        elif accuracy["low"] <= rule:
            found.append(
                f"It is not surely better than always taking the {name} completion ({percent(rule)}): it may have "
                "learned length and little else. Use more votes, or pairs of equal length."
            )
    if length["correlation"] is not None and abs(length["correlation"]) > HIGH_LENGTH_CORRELATION:
        found.append(
            f"Its rewards follow length (correlation {length['correlation']:+.2f} within a prompt), so a policy "
            f"trained on it drifts to {'longer' if length['correlation'] > 0 else 'shorter'} completions. Watch their "
            "length, and balance the pairs by length."
        )
    if temperature["problem"] is not None:
        found.append(f"Its probabilities could not be put right: {temperature['problem']}.")
    elif temperature["low"] is None or temperature["high"] > WIDE_TEMPERATURE * temperature["low"]:
        bounds = (
            "no interval" if temperature["low"] is None else f"{temperature['low']:.2g} to {temperature['high']:.2g}"
        )
        found.append(f"Its temperature is uncertain ({bounds}): hold out more prompts.")
    if calibration is None:
        found.append("No votes are left to check its probabilities on: hold out more prompts.")
    elif calibration["after"]["ece"] > HIGH_ECE:
        after = calibration["after"]
        found.append(
            f"Its probabilities are off by {percent(after['ece'])} on average even at the fitted temperature (so few "
            f"votes alone make that {percent(after['ece_by_chance'])}): do not read them as shares of raters."
        )
    if report["consistency"] is not None and report["consistency"] < LOW_CONSISTENCY:
        found.append(
            f"On {percent(1 - report['consistency'])} of the pairs its verdict depends on which completion comes "
            "first. Both orders are averaged; train longer, or with more pairs."
        )
    truncated = sizes["truncated"]
    if truncated is not None and truncated > MANY_TRUNCATED * sizes["completions"]:
        found.append(
            f"{truncated:,} of {sizes['completions']:,} held-out completions did not fit into max_length and were "
            "judged in part. Raise train_rm.max_length."
        )
    if sizes["pairs_scored_equal"] > 0.5 * sizes["pairs"]:
        found.append(
            "More than half of the pairs get the same score twice: the head may be reading padding instead of the text."
        )
    return found


def share(estimate: Report) -> str:
    value, low, high = (percent(estimate[name]) for name in ("value", "low", "high"))
    return f"{value} of the time (95% interval {low} to {high})"


def percent(value: float) -> str:
    return f"{value:.1%}"


class Row(NamedTuple):
    """A line of the table: what was measured, the figure, its 95% interval, and on how much."""

    name: str
    value: str
    interval: str
    of: str


def rows(report: Report) -> list[Row]:
    """The table for people; what is not known is left out. Names of sources are as the data have them: untrusted."""
    longer, ceiling, votes = report["longer_wins"], report["ceiling"], report["vote_accuracy"]
    found = [
        _row("accuracy", report["accuracy"]),
        _row("longer wins (characters)", longer["characters"]),
        _row("longer wins (tokens)", longer["tokens"]),
        _row("ahead of the rule of length", longer["advantage"], signed=True),
        _row("raters, half against half", ceiling),
    ]
    if ceiling is not None:
        found += [
            _row("the model on these pairs", ceiling["accuracy_on_the_same"]),
            Row("reachable, all raters", percent(ceiling["corrected"]), "", "estimate"),
        ]
    found.append(_row("votes that go its way", votes, of=f"{report['sizes']['votes']:,.0f} votes"))
    found.append(Row("most that could", percent(votes["best_possible"]), "", ""))
    if report["consistency"] is not None:
        found.append(Row("both orders agree", percent(report["consistency"]), "", ""))
    found += _calibration_rows(report)
    length = report["length"]
    for name, key in (("rewards follow length", ""), ("votes follow length", "_of_votes")):
        if length[f"correlation{key}"] is not None:
            found.append(Row(name, f"{length[f'correlation{key}']:+.2f}", "", "within a prompt"))
    for title, key in (("source", "by_source"), ("votes", "by_margin"), ("length", "by_length")):
        found += [_row(f"{title}: {kind['name']}", kind) for kind in report[key][:MOST_KINDS]]
        if len(report[key]) > MOST_KINDS:
            found.append(Row(f"{title}: the others", f"{len(report[key]) - MOST_KINDS:,} more", "", "see report.json"))
    if report["sizes"]["truncated"] is not None:
        found.append(Row("completions cut", f"{report['sizes']['truncated']:,}", "", _completions(report)))
    return [row for row in found if row is not None]


def _calibration_rows(report: Report) -> list[Row | None]:
    temperature, calibration = report["temperature"], report["calibration"]
    low, high = temperature["low"], temperature["high"]
    interval = "" if low is None else f"{low:.3g} to {high:.3g}"
    found: list[Row | None] = [
        Row("temperature", f"{temperature['value']:.3g}", interval, f"{temperature['pairs']:,} pairs")
    ]
    for when in ("before", "after") if calibration is not None else ():
        measured = calibration[when]
        of = f"{measured['pairs']:,} pairs"
        chance = f"by chance {percent(measured['ece_by_chance'])}"
        found += [
            Row(f"calibration error {when}", percent(measured["ece"]), chance, of),
            _row(f"over-confidence {when}", measured["excess"], signed=True, of=of),
            Row(f"surprise of a vote {when}", f"{measured['nll_nats']:.3f} nats", "a coin 0.693", of),
        ]
    return found


def _row(name: str, estimate: Report | None, *, signed: bool = False, of: str | None = None) -> Row | None:
    if estimate is None:
        return None
    value, low, high = (
        f"{100 * estimate[key]:+.1f}" if signed else percent(estimate[key]) for key in ("value", "low", "high")
    )
    pairs = f"{estimate['pairs']:,} pairs" if "pairs" in estimate else ""
    return Row(name, f"{value} points" if signed else value, f"{low} to {high}", pairs if of is None else of)


def _completions(report: Report) -> str:
    return f"of {report['sizes']['completions']:,}"
