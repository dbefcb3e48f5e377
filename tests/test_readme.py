"""The README's code runs as it stands, and its commands are the ones that CI runs."""

from __future__ import annotations

import re
from pathlib import Path

from tl_clt import AttributionGraph

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "Austin" in capsys.readouterr().out
    assert "".join(AttributionGraph.load("dallas.safetensors").prompt_tokens).endswith("is")


def test_there_are_two_commands_and_ci_finds_both():
    commands = [block.strip() for block in blocks("bash")]
    assert len(commands) == 2
    assert all(re.match("pip install .* && ", command) for command in commands)
    found = [line for line in README.splitlines() if re.match("pip install .* && ", line)]
    assert found == commands


def test_every_public_name_in_the_readme_exists():
    import tl_clt

    for name in re.findall(r"^\| [^|]+ \| (.+?) \|$", README, flags=re.MULTILINE):
        for word in re.findall(r"`([A-Za-z_]+)`", name):
            assert hasattr(tl_clt, word), word


def test_constraints_pin_every_dependency():
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^    "([A-Za-z0-9-]+)(?:\[\w+\])?[><=]=', project, flags=re.MULTILINE)
    assert len(wanted) >= 14
    assert set(wanted) <= pinned
