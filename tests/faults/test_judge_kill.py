"""kill -9 of a run that asks a judge: what was answered is never paid for again."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_world import Process, Smoke, copy, count, stage, state, succeeded
from endpoint_world import served
from starlette.responses import JSONResponse, Response

from rlhf_cli.feedback.answers import Answers
from rlhf_cli.feedback.items import Shown
from rlhf_cli.journal.events import GroupRanked, GroupSampled, StepTrained
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.types import WinMatrix

AT_ONCE = 3


def verdict(a: str, b: str) -> float:
    """Likes more vowels."""
    ahead = sum(a.lower().count(vowel) - b.lower().count(vowel) for vowel in "aeiou")
    return 1.0 if ahead > 0 else 0.0 if ahead < 0 else 0.5


async def answer(body: Any) -> Response:
    await asyncio.sleep(0.02)
    _, a, b = body["messages"][0]["content"].split("|||")
    message = {"content": {1.0: "A", 0.0: "B", 0.5: "tie"}[verdict(a, b)]}
    return JSONResponse({"choices": [{"message": message}], "usage": {"total_tokens": 50}})


@pytest.mark.parametrize(
    ("after", "number"),
    [(GroupSampled, 6), (StepTrained, 2)],
    ids=["groups sampled", "steps trained"],
)
def test_after_a_kill_only_what_was_under_way_is_asked_again_and_every_vote_is_the_judges(
    smoke: Smoke, tmp_path: Path, after: type, number: int
) -> None:
    folder = copy(smoke.prepared, tmp_path)
    with served(answer) as endpoint:
        judge = {"url": f"{endpoint.url}/v1", "model": "m", "prompt": "{prompt}|||{a}|||{b}", "at_once": AT_ONCE}
        sets = (
            "run_online.feedback=judge",
            f"run_online.judge={json.dumps(judge)}",
            "run_online.steps=3",
            "run_online.max_in_flight=8",
        )
        process = Process("run-online", folder, sets=sets)
        process.send(signal.SIGKILL, lambda seen: count(after, seen) >= number)
        assert process.ended().code == -signal.SIGKILL
        kept = len(Answers(RunDir(folder).judge_answers))
        ranked_before = [g.ranked for g in state(folder).groups.values() if g.ranked is not None]
        result = succeeded(stage("run-online", folder, "--resume", sets=sets))

        times = Counter(json.dumps(body["messages"]) for body in endpoint.bodies)
        assert sum(times.values()) - len(times) <= AT_ONCE  # those that were under way when it died
        assert max(times.values()) <= 2
        assert len(Answers(RunDir(folder).judge_answers)) == len(times)
        assert kept <= len(times)
        assert result["steps"] == 3
        known = state(folder)
        trained = [group for event in known.steps.values() for group in event.group_ids]
        assert len(trained) == len(set(trained)) == 12
        assert [g.ranked for g in known.groups.values() if g.ranked is not None][: len(ranked_before)] == ranked_before
        assert all(isinstance(g.ranked, GroupRanked) and g.ranked.source == "judge:m" for g in known.groups.values())
    for group in known.groups.values():
        assert group.ranked is not None
        shown = Shown.of("", [c.text for c in group.sampled.completions])
        wins = np.array([[verdict(a, b) if a != b else 0.0 for b in shown.texts] for a in shown.texts])
        assert group.ranked.matrix() == shown.over_all(WinMatrix(wins))
