"""Runs that learn from a function of the user's, from a judge, and their rehearsals, through the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_world import refused, rlhf, state, succeeded
from endpoint_world import Endpoint, served
from starlette.responses import JSONResponse, Response

from rlhf_cli.journal.journal import read
from rlhf_cli.journal.metrics import METRICS, read_metrics
from rlhf_cli.journal.replay import replay
from rlhf_cli.journal.run_dir import RunDir

SECRET = "k3y-of-the-judge"


def rows(path: Path, questions: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    return str(path)


def write(folder: Path, model: str, **sections: Any) -> Path:
    online = {
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 3,
        "sampling": {"max_new_tokens": 6},
        "learner": {"algorithm": "dpo", "learning_rate": 1e-3},
    }
    recipe = {
        "name": "own",
        "seed": 3,
        "compute": {"threads": 1},
        "model": {"path": model},
        "data": {
            "prompts": rows(folder / "prompts.jsonl", [f"Say {n}!" for n in range(6)]),
            "heldout_prompts": rows(folder / "heldout.jsonl", [f"Why {n}?" for n in range(3)]),
        },
        **sections,
        "run_online": {**online, **sections["run_online"]},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def judge() -> Iterator[Endpoint]:
    """Likes more vowels, and what it reads first where there are as many."""

    async def answer(body: Any) -> Response:
        _, a, b = body["messages"][0]["content"].split("|||")
        vowels = [sum(text.count(vowel) for vowel in "aeiou") for text in (a, b)]
        message = {"role": "assistant", "content": "A" if vowels[0] >= vowels[1] else "B"}
        return JSONResponse({"choices": [{"message": message}], "usage": {"total_tokens": 50}})

    with served(answer) as endpoint:
        yield endpoint


def by_judge(endpoint: Endpoint, **keys: Any) -> dict[str, Any]:
    section = {
        "url": f"{endpoint.url}/v1",
        "model": "m",
        "prompt": "{prompt}|||{a}|||{b}",
        "key_env": "JUDGE_KEY",
        "usd_per_1m_tokens": 20.0,
        **keys,
    }
    return {"feedback": "judge", "judge": section}


def test_a_policy_learns_from_a_function_in_a_file(tmp_path: Path, tiny: str) -> None:
    (tmp_path / "own.py").write_text(
        "async def vowels(groups):\n"
        "    print('scoring')\n"
        "    return [[sum(map(text.count, 'aeiou')) for text in one['completions']] for one in groups]\n"
    )
    section = {"file": str(tmp_path / "own.py"), "name": "vowels"}
    file = write(tmp_path, tiny, run_online={"feedback": "function", "function": section})
    result = succeeded(rlhf("run-online", file, "--run-dir", tmp_path / "run", "--json"))  # stdout is one document
    assert result["steps"] == 2
    online = state(tmp_path / "run")
    ranked = [group for group in online.groups.values() if group.ranked is not None]
    assert len(ranked) >= 4
    for group in ranked:
        assert group.ranked is not None
        expected = tuple(float(sum(map(c.text.count, "aeiou"))) for c in group.sampled.completions)
        assert (group.ranked.source, group.ranked.scores) == ("function:vowels", expected)
    assert result["votes"] == 0


def test_a_file_that_cannot_be_loaded_ends_the_run_before_anything_is_sampled(tmp_path: Path, tiny: str) -> None:
    (tmp_path / "own.py").write_text("def score(groups): return groups +\n")
    file = write(tmp_path, tiny, run_online={"feedback": "function", "function": {"file": str(tmp_path / "own.py")}})
    refused(rlhf("run-online", file, "--run-dir", tmp_path / "run"), 3, "own.py: cannot be loaded: SyntaxError")
    assert not state(tmp_path / "run").groups


def test_a_policy_learns_from_a_judge_and_is_measured_by_it(
    tmp_path: Path, tiny: str, judge: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    file = write(tmp_path, tiny, run_online=by_judge(judge), budget={"usd": 5.0}, eval={"judge": "judge"})
    result = succeeded(rlhf("run", file, "--run-dir", tmp_path / "run", "--json"))

    run = RunDir(tmp_path / "run")
    online = state(run.path)
    assert len(online.steps) == 2
    assert {group.ranked.source for group in online.groups.values() if group.ranked} == {"judge:m"}
    assert {headers["authorization"] for headers in judge.headers} == {f"Bearer {SECRET}"}
    questions = [body["messages"][0]["content"] for body in judge.bodies]
    assert len(questions) == len(set(questions))  # nothing was paid twice, by run-online and eval together
    usd = len(questions) * 50 * 20 / 1e6
    assert result["cost_usd"] == pytest.approx(usd)
    results = json.loads(run.eval_results.read_bytes())
    assert results["judge"] == "judge"
    assert results["judge_usd"] == pytest.approx(usd)
    assert 0 <= results["judge_position_bias"] <= 0.5
    assert 0 <= results["win_rate"] <= 1
    judged = replay(read(run.eval_journal)).groups.values()
    assert len(judged) + results["pairs_identical"] == results["pairs"]
    summary = online.stages["run-online"].summary
    assert summary["judge_position_bias"] is not None
    last = read_metrics(run.metrics)[-1]
    assert last["judge/requests_total"] > 0
    assert {name for name in last if name.startswith("judge/")} <= set(METRICS)
    assert not [path for path in run.path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert "position bias" in rlhf("eval", file, "--run-dir", run.path).out


def test_money_for_a_judge_ends_the_run_with_its_exit_code_and_more_of_it_goes_on(
    tmp_path: Path, tiny: str, judge: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    file = write(tmp_path, tiny, run_online=by_judge(judge), budget={"usd": 0.01})  # ten answers of 0.001
    words = ["run-online", file, "--run-dir", tmp_path / "run"]
    refused(rlhf(*words), 6, "budget.usd", "--resume")
    assert len(judge.bodies) <= 10
    again = succeeded(rlhf(*words, "--resume", "--json", "--set", "budget.usd=5"))
    assert again["steps"] == 2
    questions = [body["messages"][0]["content"] for body in judge.bodies]
    assert len(questions) == len(set(questions))


def test_a_judge_without_its_key_is_found_before_anything_is_done(
    tmp_path: Path, tiny: str, judge: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    file = write(tmp_path, tiny, run_online=by_judge(judge))
    refused(rlhf("run-online", file, "--run-dir", tmp_path / "run"), 4, "JUDGE_KEY is not set", judge.url)
    assert state(tmp_path / "run").started is None
    assert not judge.bodies


def test_a_plan_counts_the_questions_to_a_judge(tmp_path: Path, tiny: str, judge: Endpoint) -> None:
    file = write(tmp_path, tiny, run_online=by_judge(judge), eval={"judge": "judge"})
    said = succeeded(rlhf("plan", file, "--json"))
    assert said["run_online"]["judge_requests"] == 4 * 3 * 2
    assert said["eval"]["judge_requests"] == 3 * 2 * 2
    assert any("not known before" in note for note in said["notes"])


def test_a_rehearsal_asks_simulated_raters_and_nobody_else(
    tmp_path: Path, tiny: str, judge: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)  # not needed
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, tiny, run_online=by_judge(judge), budget={"usd": 5.0}, eval={"judge": "judge"})
    pace = ["flow.poll_s=0.05", "flow.crowd.latency_s.p50=0.02", "flow.crowd.latency_s.p95=0.1"]
    sets = [word for key in pace for word in ("--set", key)]
    ended = rlhf("run", "--simulate", "letters", file, "--json", *sets)
    result = succeeded(ended)
    assert "result is a rehearsal" in ended.err
    assert not judge.bodies
    assert (result["judge"], result["cost_usd"]) == ("crowd", 0)
    assert result["votes"] > 0
    run = RunDir(Path("runs") / "own-simulated")
    assert all(group.ranked.by_people for group in state(run.path).groups.values() if group.ranked)
    resolved = yaml.safe_load(run.resolved.read_text())
    assert (resolved["flow"]["service"], resolved["flow"]["crowd"]["taste"]) == ("embedded", "letters")
    assert resolved["run_online"]["feedback"] == "votes"


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("kind", ["function", "judge"])
def test_learners_that_climb_scores_learn_from_a_function_with_gaps_and_from_a_judge(
    tmp_path: Path, tiny: str, judge: Endpoint, monkeypatch: pytest.MonkeyPatch, algorithm: str, kind: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    (tmp_path / "gaps.py").write_text(
        "def score(groups):\n"
        "    return [[None, *map(len, one['completions'][1:])] if n % 2 else list(map(len, one['completions']))\n"
        "            for n, one in enumerate(groups)]\n"
    )
    function = {"feedback": "function", "function": {"file": str(tmp_path / "gaps.py")}}
    online = function if kind == "function" else by_judge(judge)
    learner = {"learner": {"algorithm": algorithm, "learning_rate": 1e-3}}
    file = write(tmp_path, tiny, run_online={**online, **learner})
    result = succeeded(rlhf("run-online", file, "--run-dir", tmp_path / "run", "--json"))
    assert result["steps"] == 2
    known = state(tmp_path / "run")
    trained = [known.groups[name] for event in known.steps.values() for name in event.group_ids]
    assert len(trained) == 4
    assert all(g.ranked is not None and g.ranked.source in ("function:score", "judge:m") for g in trained)
