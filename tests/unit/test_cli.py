"""The command line from the outside: what it prints where, how it ends, and what it does not load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from recipe_files import RECIPE, write_recipe, write_rows

from rlhf_cli.cli.stages import stoppable
from rlhf_cli.errors import Stopped
from rlhf_cli.recipe.load import load_recipe

HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "matplotlib", "numpy"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rlhf(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf_cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def loaded_by(*arguments: str) -> set[str]:
    """The heavy packages that a command loads, in a fresh interpreter."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['rlhf', *{list(arguments)!r}]\n"
        "from rlhf_cli.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return set(eval(done.stderr.splitlines()[-1]))


COMMANDS = [
    "validate",
    "config",
    "schema",
    "sft",
    "train-rm",
    "open-flow",
    "run-online",
    "eval",
    "run",
    "report",
    "plan",
    "votes",
]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_answers_without_the_ml_stack(arguments: list[str]) -> None:
    assert loaded_by(*arguments) == set()


def test_looking_at_a_recipe_needs_no_ml_stack() -> None:
    write_recipe(Path())
    assert loaded_by("validate", "recipe.yaml") == set()
    assert loaded_by("config", "recipe.yaml") == set()
    assert loaded_by("schema") == set()


def test_help_names_every_command_and_the_way_to_the_exit_codes() -> None:
    shown = rlhf("--help")
    assert shown.returncode == 0
    assert all(f"  {name} " in shown.stdout for name in COMMANDS)
    assert "rlhf help exit-codes" in shown.stdout
    assert "75" in rlhf("help", "exit-codes").stdout


def test_a_valid_recipe_is_said_to_be_valid() -> None:
    write_recipe(Path())
    done = rlhf("validate", "recipe.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "recipe.yaml: ok\n", "")


def test_five_mistakes_in_one_recipe_end_in_exit_code_3() -> None:
    text = RECIPE.replace("learning_rate", "learning_rte").replace("group_size: 4", "group_size: 1")
    write_recipe(Path(), text.replace("seed: 7", "seed: on").replace("beta", "betta").replace("ttl_s: 60", "ttl_s: 5"))
    done = rlhf("validate", "recipe.yaml")
    assert done.returncode == 3
    assert [line.split(": ")[:2] for line in done.stdout.splitlines()] == [
        ["recipe.yaml:2:1", "seed"],
        ["recipe.yaml:11:3", "sft.learning_rte"],
        ["recipe.yaml:18:3", "flow.ttl_s"],
        ["recipe.yaml:22:3", "run_online.group_size"],
        ["recipe.yaml:24:29", "run_online.learner.betta"],
    ]


def test_validate_reads_the_data_files_and_speaks_to_machines() -> None:
    write_recipe(Path())
    write_recipe(Path("other"), RECIPE.replace("seed: 7", "sed: 7"))

    done = rlhf("validate", "recipe.yaml", "other/recipe.yaml", "--format", "json")
    assert done.returncode == 3
    here, other = json.loads(done.stdout)["recipes"]
    assert here["valid"]
    assert other["problems"] == [
        {
            "file": "other/recipe.yaml",
            "line": 2,
            "column": 1,
            "key": "sed",
            "what": "unknown key; did you mean 'seed'?",
        }
    ]

    write_rows(Path("heldout.jsonl"), [{"prompt": "a"}, {"promt": "?"}])
    done = rlhf("validate", "recipe.yaml", "other/recipe.yaml", "--format", "github")
    assert done.stdout.splitlines() == [
        "::error file=heldout.jsonl,line=2::'prompt' is missing",
        "::error file=other/recipe.yaml,line=2,col=1::sed: unknown key; did you mean 'seed'?",
    ]


def test_config_prints_a_recipe_that_loads_to_the_same(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = rlhf("config", "recipe.yaml", "--set", "run_online.steps=5")
    assert done.returncode == 0
    assert "  steps: 5 " in done.stdout
    assert "# --set" in done.stdout
    Path("again.yaml").write_text(done.stdout)
    assert load_recipe(Path("again.yaml")).recipe == load_recipe(recipe, ["run_online.steps=5"]).recipe
    document = json.loads(rlhf("config", "recipe.yaml", "--json").stdout)
    assert document["recipe"]["run_online"]["learner"]["beta"] == 0.2
    assert document["origins"]["run_online.learner.beta"] == "recipe.yaml:24:29"


def test_schema_goes_to_stdout_or_to_a_file() -> None:
    assert json.loads(rlhf("schema").stdout)["properties"]["run_online"]
    assert rlhf("schema", "-o", "schema.json").stdout == ""
    assert json.loads(Path("schema.json").read_text())["properties"]["run_online"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["validate", "absent.yaml"], 3),
        (["sft", "absent.yaml"], 3),
        (["sft", "recipe.yaml", "--set", "sft=null"], 3),
        (["run", "recipe.yaml", "--set", "sed=1"], 3),
        (["run", "recipe.yaml", "--set", "seed"], 2),
        (["run", "recipe.yaml", "--resume", "--fresh"], 2),
        (["run", "recipe.yaml", "--output", "loud"], 2),
        (["run"], 2),
        (["runn"], 2),
        (["validate", "recipe.yaml", "--formt", "json"], 2),
        (["report", "runs/absent"], 2),
        (["help", "absent"], 2),
    ],
)
def test_a_call_that_cannot_work_ends_with_its_exit_code_and_no_traceback(arguments: list[str], code: int) -> None:
    write_recipe(Path())
    done = rlhf(*arguments)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr
    assert not Path("runs").exists()


def test_a_data_mistake_ends_a_stage_before_anything_is_written() -> None:
    write_recipe(Path())
    write_rows(Path("heldout.jsonl"), [{"prompt": ""}])
    done = rlhf("run", "recipe.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "error: heldout.jsonl:1: 'prompt' is empty\n")
    assert not Path("runs").exists()


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    write_recipe(Path())
    command = f"{sys.executable} -m rlhf_cli schema | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["{", "0"]
    assert done.stderr == ""


def test_control_characters_of_strangers_do_not_reach_the_terminal() -> None:
    done = rlhf("validate", "a\x1b[31m\u202eb.yaml")
    assert done.returncode == 3
    assert "\x1b" not in done.stdout + done.stderr
    assert "\u202e" not in done.stdout + done.stderr


def test_a_bug_leaves_its_traceback_in_a_file_and_one_line_on_the_terminal(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    code = (
        "import sys\n"
        "sys.argv = ['rlhf', 'schema']\n"
        "from rlhf_cli.cli import check\n"
        "from rlhf_cli.cli.crash import crash_goes_to\n"
        "from pathlib import Path\n"
        "if len(sys.argv) and Path('run').is_dir(): crash_goes_to(Path('run'))\n"
        "import rlhf_cli.recipe.reference as reference\n"
        "def broken():\n"
        "    password = 'hunter2' + '!' * 3\n"
        "    raise ZeroDivisionError('oops')\n"
        "reference.json_schema = broken\n"
        "from rlhf_cli.cli.main import main\n"
        "main()\n"
    )
    for folder in (tmp_path / "temp", tmp_path / "run"):
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path / "temp")},
        )
        (file,) = folder.glob("crash-*.txt")
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "ZeroDivisionError" in line
        assert file.name in line
        assert "oops" in file.read_text()
        assert "hunter2!!!" not in file.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_closes_everything_and_ends_with_its_exit_code(number: signal.Signals, code: int) -> None:
    closed: list[bool] = []
    stage = ExitStack()
    stage.callback(closed.append, True)
    with pytest.raises(Stopped, match=number.name) as caught, stoppable(), stage:
        signal.raise_signal(number)
    assert (caught.value.exit_code, closed) == (code, [True])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
