"""The code of README and guide runs as it stands and prints what they show; the commands are those that CI runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tl_clt import AttributionGraph

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
GUIDE = (ROOT / "tutorials" / "guide.md").read_text()
NUMBER = r"-?\d+\.\d+"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_readme_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,), (shown,) = blocks("python"), blocks("text")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.sub(NUMBER, "x", printed).split() == re.sub(NUMBER, "x", shown).split()
    # Weights are float32, and machines add in different orders; what is shown is rounded to two decimals at least.
    for one, other in zip(re.findall(NUMBER, printed), re.findall(NUMBER, shown), strict=True):
        assert abs(float(one) - float(other)) < 0.011
    assert "".join(AttributionGraph.load("dallas.safetensors").prompt_tokens).endswith("is")


@pytest.mark.parametrize("block", blocks("python", GUIDE), ids=range(len(blocks("python", GUIDE))))
def test_every_block_of_the_guide_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "guide.md", "exec"), {})


def test_there_are_two_commands_and_ci_finds_both():
    commands = [block.strip() for block in blocks("bash")]
    assert len(commands) == 2
    assert all(re.match("pip install .* && ", command) for command in commands)
    found = [line for line in README.splitlines() if re.match("pip install .* && ", line)]
    assert found == commands


def test_the_readme_names_the_public_names_and_no_others():
    import tl_clt

    rows = re.findall(r"^\| [^|]+ \| (.+?) \|$", README, flags=re.MULTILINE)
    named = {word for row in rows for word in re.findall(r"`([A-Za-z_]+)`", row)} | set(
        re.findall(r"\b[A-Za-z_]+\b", "".join(blocks("python")))
    )
    assert set(tl_clt.__all__) - {"CrossLayerTranscoderConfig"} <= named
    for row in rows:
        for word in re.findall(r"`([A-Za-z_]+)`", row):
            assert hasattr(tl_clt, word), word


def test_constraints_pin_every_dependency():
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^    "([A-Za-z0-9-]+)(?:\[\w+\])?[><=]=', project, flags=re.MULTILINE)
    assert len(wanted) >= 14
    assert set(wanted) <= pinned


def test_each_formula_is_where_contributing_says():
    rows = re.findall(r"^\| [^|]+ \| `(tl_clt/[^`]+)\.py` \| (.+?) \|$", CONTRIBUTING, flags=re.MULTILINE)
    assert len(rows) >= 11
    for path, names in rows:
        module = importlib.import_module(path.replace("/", "."))
        for name in re.findall(r"`([A-Za-z_.]+)`", names):
            found = module
            for part in name.split("."):
                found = getattr(found, part)
            assert found.__module__ == module.__name__ and len(found.__doc__) > 40, name


def test_every_file_that_contributing_names_exists():
    rows = [line for line in CONTRIBUTING.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", row)}
    assert len(named) >= 20
    for name in named:
        assert any((ROOT / root / name).exists() for root in ("", "tl_clt", "tl_clt/training")), name
