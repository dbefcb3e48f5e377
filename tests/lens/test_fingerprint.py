"""A model's fingerprint: of its weights and settings, and of nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.models import save_hf, tiny_hf
from tl_clt.lens import load_model, model_fingerprint


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_equal_models_have_equal_fingerprints_wherever_they_are(tmp_path, backend: str) -> None:
    for name in ("one", "two"):
        save_hf(tiny_hf("gpt2"), tmp_path / name)
    one, two = (load_model(str(tmp_path / name), backend=backend) for name in ("one", "two"))
    assert model_fingerprint(one) == model_fingerprint(two)
    two.cfg.device = "elsewhere"
    assert model_fingerprint(one) == model_fingerprint(two)
    with torch.no_grad():
        weight = next(iter(two.parameters()))
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
    assert model_fingerprint(one) != model_fingerprint(two)


def test_settings_and_number_types_count(tmp_path) -> None:
    model = load_model(str(save_hf(tiny_hf("gpt2"), tmp_path / "m")))
    before = model_fingerprint(model)
    model.cfg.eps *= 2
    changed = model_fingerprint(model)
    assert changed != before
    assert model_fingerprint(model.to(torch.bfloat16)) != changed


def test_a_model_that_reads_text_in_another_thread_keeps_its_fingerprint(tmp_path, monkeypatch) -> None:
    model = load_model(str(save_hf(tiny_hf("gpt2"), tmp_path / "m")))
    before = model_fingerprint(model)
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)  # as it stands while to_tokens runs
    assert model_fingerprint(model) == before
