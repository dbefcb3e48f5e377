"""Ctrl-C at any time: one line, status 130, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.warm_process import WarmProcess
from tl_clt import AttributionGraph
from tl_clt.organisms import organism_folder

ATLAS_CLT = str(organism_folder("atlas") / "clt")
PROMPT = "the capital of the state containing Dallas is"

INTERRUPTING = """
import os, runpy, signal, sys
event, words, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
# Runs started in the background of a shell leave SIGINT ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
pending = [True]
def interrupt(name, args):
    if pending and name == event and words in str(args):
        pending.clear()
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
sys.argv = ["tl-clt", *arguments]
runpy.run_module("tl_clt.cli", run_name="__main__", alter_sys=True)
"""
"""Runs the command line, with a SIGINT at the first audited event of a name and with words in its arguments."""


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "TERM": "dumb", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def interrupted_at(warm_process: WarmProcess) -> Callable[..., str]:
    """What a command says on stderr that gets a SIGINT at a moment; how it must end is checked."""

    def run(event: str, words: str, *arguments: str) -> str:
        done = warm_process.run(INTERRUPTING, event, words, *arguments, environment=environment())
        return check_end(done.status, done.stderr)

    return run


def check_end(status: int, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("Interrupted. ")]
    assert status == 130, (status, stderr)
    assert "Traceback" not in stderr and "KeyboardInterrupt" not in stderr, stderr
    assert lines == stderr.splitlines()[-1:], stderr
    return lines[0]


def trace(output: Path) -> tuple[str, ...]:
    return ("trace", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--output", str(output))


@pytest.fixture
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(["the capital of Texas is Austin .", "Dallas is a city in Texas ."] * 100))
    return str(path)


@pytest.mark.parametrize("module", ["typer", "rich.console", "tl_clt.cli.train", "torch", "transformer_lens"])
def test_during_imports(tmp_path, module):
    command = [sys.executable, "-c", INTERRUPTING, "import", f"('{module}'", *trace(tmp_path / "a" / "g")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    said = check_end(done.returncode, done.stderr)
    assert said == "Interrupted. Nothing was written."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("event", "words"), [("open", "cfg.json"), ("os.rename", ".unfinished.")])
def test_while_a_graph_is_made_and_written(interrupted_at, tmp_path, event, words):
    assert interrupted_at(event, words, *trace(tmp_path / "a" / "g")) == "Interrupted. Nothing was written."
    assert list(tmp_path.iterdir()) == []


def test_while_a_graph_is_shown_it_is_kept(interrupted_at, tmp_path):
    path = tmp_path / "g"
    assert interrupted_at("import", "('tl_clt.viewer", *trace(path)) == f"Interrupted. The graph is in {path}."
    assert len(AttributionGraph.load(path).nodes) > 100
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_while_an_evaluation_is_saved(interrupted_at, tmp_path, text):
    arguments = ("--clt", ATLAS_CLT, "--dataset", text, "--output", str(tmp_path / "out"), "--max-tokens", "100")
    said = interrupted_at("open", "density.png", "evaluate", *arguments, "--n-graphs", "0")
    assert said == "Interrupted. Nothing was written." and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "options"), [("list", ()), ("intervene", ("--clt", ATLAS_CLT, "--prompt", PROMPT, "--add", "1:2:3=1"))]
)
def test_commands_that_write_nothing(interrupted_at, command, options):
    assert interrupted_at("import", "('tl_clt.transcoder.hub'", command, *options).startswith("Interrupted. ")


def test_a_comparison_says_what_it_has_trained(interrupted_at, tmp_path, text):
    output = tmp_path / "out"
    said = interrupted_at(
        *("open", "tradeoff.csv", "tradeoff", "--model", "atlas", "--dataset", text, "--output", str(output)),
        *("--train-on", text, "--d-transcoder", "8", "--l0", "2", "--training-tokens", "512", "--max-tokens", "100"),
        *("--n-graphs", "0", "--context-size", "32"),
    )
    trained = [output / "clt-8-l0-2", output / "plt-8-l0-2"]
    assert said.endswith(f"can be compared with --clt {trained[0]} --clt {trained[1]}.")
    assert sorted(output.iterdir()) == trained


def test_training_says_how_it_goes_on_and_does(interrupted_at, tmp_path, text):
    sizes = ("--d-transcoder", "8", "--batch-size", "256", "--context-size", "32", "--training-tokens", "1000000")
    checkpoints = tmp_path / "checkpoints"
    options = ("--model", "atlas", "--dataset", text, "--output", str(tmp_path / "clt"), *sizes)
    command = [sys.executable, "-m", "tl_clt.cli", "train", *options, "--checkpoint-every", "5"]
    process = subprocess.Popen(
        [*command, "--checkpoints", str(checkpoints)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    while process.poll() is None and not list(checkpoints.glob("step_*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=1200)
    said = check_end(process.returncode, stderr[stderr.index("Interrupted") :])
    assert "Traceback" not in stderr
    newest = max(checkpoints.iterdir())
    step = int(newest.name[5:])
    assert f"step {step}: the same command with --resume {checkpoints} goes on." in said
    given = shlex.split(said.partition("In full: ")[2])
    assert given == ["tl-clt", *command[3:], "--checkpoints", str(checkpoints), "--resume", str(checkpoints)]
    assert not (tmp_path / "clt").exists() and all(p.name.startswith("step_") for p in checkpoints.iterdir())
    # It does go on; here to be cut off again while its next checkpoint is written, which comes to its end.
    resumed = interrupted_at("os.rename", "step_", *given[1:])
    last = max(checkpoints.iterdir())
    assert f"step {int(last.name[5:])}:" in resumed and step < int(last.name[5:]) <= step + 5
    assert json.loads((last / "checkpoint.json").read_text())["step"] == int(last.name[5:])


def test_training_without_checkpoints_leaves_one_where_it_is_interrupted(tmp_path, text):
    sizes = ("--d-transcoder", "8", "--batch-size", "256", "--context-size", "32", "--training-tokens", "1000000")
    options = ("--model", "atlas", "--dataset", text, "--output", str(tmp_path / "clt"), "--log-every", "2", *sizes)
    (tmp_path / "clt-interrupted").mkdir()  # of an earlier run
    command = [sys.executable, "-u", "-m", "tl_clt.cli", "train", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), **pipes)
    assert process.stdout is not None
    next(line for line in process.stdout if "/3906" in line or "4 of" in line or line.lstrip()[:1].isdigit())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=1200)
    said = check_end(process.returncode, stderr[stderr.index("Interrupted") :])
    folder = tmp_path / "clt-interrupted-2"
    [left] = folder.glob("step_*")
    assert f"step {int(left.name[5:])}: the same command with --resume {folder} goes on." in said
    assert sorted(p.name for p in folder.iterdir()) == ["progress.csv", left.name]
    other = tmp_path / "other.txt"
    other.write_text("the capital of Texas is Austin .\n" * 2000)
    again = subprocess.run(
        [*command[:-2], "--dataset", str(other), "--training-tokens", "1000000", "--resume", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 1 and "was made with another text" in " ".join(again.stderr.split())


def test_training_that_is_interrupted_while_it_writes_leaves_nothing(interrupted_at, tmp_path, text):
    sizes = ("--d-transcoder", "8", "--batch-size", "256", "--context-size", "32", "--training-tokens", "2048")
    options = ("--model", "atlas", "--dataset", text, "--output", str(tmp_path / "clt"), *sizes)
    said = interrupted_at("open", "training.json", "train", *options)
    assert said == "Interrupted. No CLT and no checkpoint was written."
    assert list(tmp_path.iterdir()) == []
