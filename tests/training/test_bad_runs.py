"""Runs that cannot end well say so, with the mend, and leave nothing that passes for a good CLT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.conftest import tiny_model
from tl_clt.errors import ConfigError, NotFinite
from tl_clt.training import CLTTrainingRunner
from tl_clt.training.run.trainer import CLTTrainer, require_finite_weights

# -- infinities, and what is no number


@pytest.mark.parametrize("changes", [{"activation": "topk"}, {"activation": "jumprelu"}, {"dtype": "bfloat16"}])
def test_a_learning_rate_far_too_high_stops_the_run_by_step_and_term(
    model, tokens, make_config, tmp_path: Path, changes: dict
) -> None:
    folders = {"output_path": str(tmp_path / "clt"), "checkpoint_path": str(tmp_path / "steps")}
    cfg = make_config(lr=1e30, checkpoint_every=5, **folders, **changes)
    with pytest.raises(NotFinite, match=r"stopped at step \d of 40: .*mse_loss is \w+.* Lower lr .now 1e\+30"):
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    assert list(tmp_path.iterdir()) == []


def test_the_weights_of_a_step_that_is_not_finite_are_those_before_it(model, tokens, make_config, monkeypatch) -> None:
    trainers: list[CLTTrainer] = []
    real = CLTTrainer._forward

    def poisoned(self: CLTTrainer, sae, step_input):
        trainers[:] = [self]
        output = real(self, sae, step_input)
        if step_input.n_training_steps < 3:
            return output
        # A term whose value is finite and whose gradient is not.
        b = sae.b_enc[1].sum()
        endless = torch.sqrt(b - b.detach())
        return replace(output, loss=output.loss + endless)

    monkeypatch.setattr(CLTTrainer, "_forward", poisoned)
    with pytest.raises(NotFinite, match="at step 4 of 40: the gradient's norm is inf, from b_enc.1.") as caught:
        CLTTrainingRunner(make_config(), model=model, dataset=tokens).run()
    assert "Lower lr (now 0.01), lengthen lr_warm_up_steps" in str(caught.value)
    assert all(value.isfinite().all() for value in trainers[0].sae.state_dict().values())


def test_activations_that_are_not_finite_are_told_as_the_models(tokens, make_config, monkeypatch) -> None:
    broken, calls = tiny_model(), []

    def spoil(value: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(1)
        return value.masked_fill(torch.arange(value.shape[-1]) == 3, torch.inf) if len(calls) > 6 else value

    broken.blocks[2].hook_mlp_out.add_hook(spoil, is_permanent=True)
    with pytest.raises(NotFinite, match="the model's activations are infinite .* float32 .model_dtype."):
        CLTTrainingRunner(make_config(prefetch=False), model=broken, dataset=tokens).run()


def test_weights_that_are_not_finite_are_not_saved(model, tokens, make_config, monkeypatch, tmp_path: Path) -> None:
    real = CLTTrainer.fit

    def then_break(self: CLTTrainer):
        result = real(self)
        with torch.no_grad():
            self.sae.W_enc[2][0, 0] = torch.nan
        return result

    cfg = make_config(output_path=str(tmp_path / "clt"))
    with monkeypatch.context() as patched:
        patched.setattr(CLTTrainer, "fit", then_break)
        with pytest.raises(NotFinite, match="At the end of training, these weights .*: W_enc. Nothing is saved"):
            CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFinite, match="After step 3, .*: b. .*dtype='float32' without autocast"):
        weights = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])}
        require_finite_weights(weights, "After step 3", replace(cfg, autocast=True))


def test_a_last_step_that_ruins_the_clt_is_found(model, tokens, make_config) -> None:
    """Its weights are finite, and what they write is not."""
    with pytest.raises(NotFinite, match="the error of the reconstruction of layers 0, 1, 2 is infinite or no number"):
        cfg = make_config(activation="relu", lr=1e30, training_tokens=64)
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()


def test_weights_in_float16_are_refused_with_the_mend(make_config) -> None:
    with pytest.raises(ConfigError, match="dtype is 'float16': .* Give 'bfloat16', .* or 'float32'"):
        make_config(dtype="float16")
    assert make_config(model_dtype="float16").model_dtype == "float16"
