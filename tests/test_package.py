"""The package as a whole: what importing it loads, and what its public names are."""

from __future__ import annotations

import ast
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import tl_clt
from tests.conftest import modules_after

LATE = ("sae_lens", "plotly", "matplotlib", "starlette", "uvicorn", "wandb")


def test_importing_loads_no_training_plotting_or_web_library_before_it_is_used():
    names = "attach, attribute, load_organism, validate, evaluate"
    before, after = modules_after(f"import tl_clt\nfrom tl_clt import {names}", "tl_clt.CLTTrainingRunner")
    assert not before & set(LATE)
    assert "sae_lens" in after


def test_help_of_any_command_waits_for_neither_training_nor_models():
    """Options of `train` are fields of the config, which needs neither."""
    lines = (
        "from typer.main import get_command",
        "from typer.testing import CliRunner",
        "from tl_clt.cli import app",
        "commands = get_command(app).commands",
        "assert 'train' in commands",
        "results = [CliRunner().invoke(app, [name, '--help']) for name in commands]",
        "assert all(result.exit_code == 0 and 'Usage' in result.output for result in results)",
    )
    (loaded,) = modules_after("\n".join(lines))
    assert not loaded & {"sae_lens", "transformer_lens", "transformers", "datasets"}


def test_every_public_name_can_be_loaded():
    for name in tl_clt.__all__:
        assert getattr(tl_clt, name).__name__ == name
    assert set(tl_clt.__all__) <= set(dir(tl_clt))


def test_every_name_of_training_can_be_loaded_and_is_offered():
    import tl_clt.training as room

    assert set(room.__all__) <= set(dir(room)) and len(room.__all__) > 10
    for name in room.__all__:
        assert getattr(room, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'tl_clt\.training' has no attribute 'CLTTrainingRuner'"):
        _ = room.CLTTrainingRuner


def test_what_an_editor_offers_is_public_names_and_rooms():
    for name in set(dir(tl_clt)) - set(tl_clt.__all__):
        assert name.startswith("__") or f"tl_clt.{name}" in sys.modules


def test_the_list_of_public_names_is_the_contract_and_more():
    """What tests outside the project import; the list itself stands in `__init__.pyi` alone."""
    contract = {
        *("CrossLayerTranscoder", "CrossLayerTranscoderConfig", "load_model", "load_organism", "attach"),
        *("frozen_hooks", "attribute", "AttributionGraph", "NodeKind", "Intervention", "intervention_hooks"),
        *("intervene", "validate", "evaluate", "CLTTrainingRunner", "CLTTrainingRunnerConfig", "feature_acts"),
    }
    assert contract <= set(tl_clt.__all__) and len(set(tl_clt.__all__)) == len(tl_clt.__all__)


def test_types_are_told_to_editors():
    """`py.typed` and the stub come with the package, and the stub re-exports every name (`X as X`)."""
    package = files("tl_clt")
    assert package.joinpath("py.typed").is_file()
    stub = ast.parse(package.joinpath("__init__.pyi").read_text())
    imported = [name for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert imported and all(name.asname == name.name for name in imported)
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"tl_clt" = ["py.typed", "*.pyi"]' in pyproject and '"tl_clt.training" = ["*.pyi"]' in pyproject


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atribute'"):
        _ = tl_clt.atribute


UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LOADERS_OF_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def name_of(node: ast.expr) -> str:
    """ "torch.load", or ".load" of what is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def what_can_run_code(source: str) -> list[str]:
    """Calls and imports through which reading a file, or text, can run code that is in it."""
    tree, found = ast.parse(source), []
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    safe = {node.name for node in classes if [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [alias.name for alias in node.names]
            whole = named if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in whole if name.split(".")[0] in UNPICKLERS]
            # Only by their full names can loaders be told below.
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "yaml", "pandas"):
                found += [name for name in named if name in {"load", "read_pickle", *LOADERS_OF_YAML}]
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        called = name_of(node.func)
        room, _, name = called.rpartition(".")
        unsafe = (
            (called == "torch.load" and given.get("weights_only") is not True)
            or any(
                k.arg in ("allow_pickle", "trust_remote_code") and given.get(k.arg) is not False for k in node.keywords
            )
            or (room == "yaml" and name in LOADERS_OF_YAML and not {ast.unparse(arg) for arg in node.args} & safe)
            or name in ("read_pickle", "load_from_checkpoint")
            or called in ("eval", "exec", "torch.hub.load")
        )
        if unsafe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=chosen)", True),
        ("torch.load(path, weights_only=True)", False),
        ("from torch import load", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("np.load(path, allow_pickle=False)", False),
        ("yaml.load(text, Loader=yaml.Loader)", True),
        ("yaml.load(text, Mine)", True),
        ("class Mine(yaml.UnsafeLoader): ...\nyaml.load(text, Mine)", True),
        ("class Mine(yaml.SafeLoader): ...\nyaml.load(text, Mine)", False),
        ("yaml.safe_load(text)", False),
        ("def f():\n    import pickle", True),
        ("from joblib import load", True),
        ("pd.read_pickle(path)", True),
        ("model.eval()", False),
        ("eval(text)", True),
        ("{}[torch.load(path)].eval()", True),
        ("made()[0].load(path).eval()", False),
        ("load(path, trust_remote_code=True)", True),
    ],
)
def test_what_can_run_code_is_found(source, expected):
    assert bool(what_can_run_code(source)) == expected


def test_nothing_that_is_read_can_run_code():
    files = sorted(Path(tl_clt.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    assert {str(path): found for path in files if (found := what_can_run_code(path.read_text(encoding="utf-8")))} == {}
