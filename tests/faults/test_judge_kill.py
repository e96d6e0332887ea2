"""kill -9 of a run that asks a judge: what was answered is never paid for again."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cli_world import Process, Smoke, copy, count, stage, state, succeeded
from endpoint_world import served
from starlette.responses import JSONResponse, Response

from rlhf_cli.feedback.answers import Answers
from rlhf_cli.journal.events import GroupRanked, GroupSampled, StepTrained
from rlhf_cli.journal.run_dir import RunDir

AT_ONCE = 3


async def vowels(body: Any) -> Response:
    """Likes more vowels, and takes its time."""
    await asyncio.sleep(0.02)
    _, a, b = body["messages"][0]["content"].split("|||")
    ahead = sum(a.lower().count(vowel) - b.lower().count(vowel) for vowel in "aeiou")
    message = {"content": "A" if ahead > 0 else "B" if ahead < 0 else "tie"}
    return JSONResponse({"choices": [{"message": message}], "usage": {"total_tokens": 50}})


def weights(folder: Path) -> bytes:
    return (RunDir(folder).online_model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("after", "number"),
    [(GroupSampled, 6), (StepTrained, 2)],
    ids=["groups sampled", "steps trained"],
)
def test_after_a_kill_only_what_was_under_way_is_asked_again_and_the_run_is_the_same(
    smoke: Smoke, tmp_path: Path, after: type, number: int
) -> None:
    folder, undisturbed = copy(smoke.prepared, tmp_path), tmp_path / "undisturbed"
    shutil.copytree(smoke.prepared, undisturbed)
    with served(vowels) as endpoint:
        judge = {"url": f"{endpoint.url}/v1", "model": "m", "prompt": "{prompt}|||{a}|||{b}", "at_once": AT_ONCE}
        # Every group is out before it is needed, so that pace changes nothing: one batch a step.
        sets = (
            "run_online.feedback=judge",
            f"run_online.judge={json.dumps(judge)}",
            "run_online.steps=3",
            "run_online.max_in_flight=4",
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
        endpoint.bodies.clear()
        assert succeeded(stage("run-online", undisturbed, sets=sets))["steps"] == 3
    assert weights(folder) == weights(undisturbed)
