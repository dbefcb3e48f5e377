"""The package as a whole: what importing it loads, and what its public names are."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tl_clt

LATE = ("sae_lens", "plotly", "matplotlib", "starlette", "uvicorn", "wandb")


def modules_after(code: str) -> set[str]:
    """Names of the top-level modules that are loaded after some code has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("code", ["import tl_clt", "from tl_clt import attach, attribute, load_organism"])
def test_importing_loads_no_training_plotting_or_web_library(code):
    assert not modules_after(code) & set(LATE)


def test_training_loads_sae_lens_when_it_is_used():
    assert "sae_lens" in modules_after("from tl_clt import CLTTrainingRunner")


def test_every_public_name_can_be_loaded():
    for name in tl_clt.__all__:
        assert getattr(tl_clt, name).__name__ == name
    assert set(tl_clt.__all__) <= set(dir(tl_clt))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atribute'"):
        _ = tl_clt.atribute
