"""Every tutorial runs from its first cell to its last."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TUTORIALS = sorted((TESTS.parent / "tutorials").glob("*.ipynb"))
REAL_MODEL = "07_a_real_model"
"""It loads Gemma 3 270M and trains a CLT of it."""


def test_there_are_tutorials():
    assert REAL_MODEL in [path.stem for path in TUTORIALS]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.real_model] if p.stem == REAL_MODEL else []) for p in TUTORIALS],
)
def test_tutorial_runs(path, tmp_path, monkeypatch):
    """In a folder that lies beside `tests`, as `tutorials` does, and is empty."""
    (tmp_path / "tests").symlink_to(TESTS, target_is_directory=True)
    (tmp_path / "tutorials").mkdir()
    monkeypatch.chdir(tmp_path / "tutorials")
    names: dict[str, object] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_holds_its_outputs(path):
    """Those of a run without errors; no bars or warnings, and no paths of the machine that it was run on."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert all(output["output_type"] != "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(outputs))
