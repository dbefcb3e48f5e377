"""The fast step against its definition: `CLTLayers`' plain passes, `losses`, and autograd, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.training.test_training_clt import COEFFICIENTS, build, step_input
from tl_clt.training import step as step_module
from tl_clt.training import terms
from tl_clt.training.losses import dead_feature_loss, decoder_norms, mse_loss, sparsity_loss
from tl_clt.training.step import Workspace
from tl_clt.training.training_clt import TrainingCLT

KINDS = {
    "relu": {"activation": "relu"},
    "jumprelu, all": {"activation": "jumprelu", "straight_through": "all"},
    "jumprelu, threshold": {"activation": "jumprelu", "straight_through": "threshold"},
    "topk": {"activation": "topk"},
}
SPARSE = {"dense": 0.0, "sparse": 1.1}


def defined_loss(clt: TrainingCLT, coefficients: dict[str, float] = COEFFICIENTS) -> torch.Tensor:
    inputs, outputs = step_input(clt).sae_in.unbind(dim=1)
    thresholds, norms = clt.thresholds(), decoder_norms(list(clt.W_dec))
    feature_acts, hidden_pre = zip(*clt.encode_layers(inputs.unbind(dim=1), thresholds), strict=True)
    loss = mse_loss(clt.decode_layers(feature_acts), outputs)
    if clt.cfg.activation != "topk":
        loss = loss + coefficients["sparsity"] * sparsity_loss(feature_acts, norms, clt.cfg.tanh_scale)
        loss = loss + coefficients["dead_feature"] * dead_feature_loss(hidden_pre, thresholds, norms)
    return loss


def gradients(clt: TrainingCLT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    grads = {name: p.grad.clone() for name, p in clt.named_parameters() if p.grad is not None}
    clt.zero_grad(set_to_none=True)
    return grads


@pytest.fixture(params=SPARSE)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products over all features, or over active ones only; blocks of two tokens."""
    monkeypatch.setitem(step_module.SPARSE_BELOW, "cpu", SPARSE[request.param])
    monkeypatch.setitem(terms.BLOCK_ELEMENTS, "cpu", 20)
    return request.param


@pytest.mark.parametrize(("kind", "span"), product(KINDS, [1, 2, 3]))
def test_loss_and_every_gradient_are_those_of_the_definition(products: str, kind: str, span: int) -> None:
    clt = build(**KINDS[kind], span=span)
    ours = clt.step(step_input(clt), Workspace())
    got, want = gradients(clt, ours.loss), gradients(clt, defined_loss(clt))
    torch.testing.assert_close(ours.loss, defined_loss(clt), rtol=1e-12, atol=0)
    assert got.keys() == want.keys() == dict(clt.named_parameters()).keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_over_backward_passes(products: str, kind: str) -> None:
    clt = build(**KINDS[kind])
    want = gradients(clt, clt.step(step_input(clt), Workspace()).loss)
    workspace = Workspace()
    for _ in range(3):
        clt.step(step_input(clt), workspace).loss.backward()
    for name, parameter in clt.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * want[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_firing_counts_are_those_of_the_definition(products: str, kind: str) -> None:
    clt = build(**KINDS[kind])
    ours = clt.step(step_input(clt), Workspace())
    acts, hidden_pre = clt.encode_with_hidden_pre(step_input(clt).sae_in[:, 0])
    torch.testing.assert_close(torch.cat([f.dense() for f in ours.features], dim=1), acts)
    torch.testing.assert_close(torch.cat(ours.hidden_pre, dim=1), hidden_pre)
    assert torch.equal(ours.fired, (acts > 0).sum(dim=0))


def test_no_dead_feature_loss_where_its_coefficient_is_zero() -> None:
    clt = build("jumprelu")
    coefficients = {"sparsity": 0.7, "dead_feature": 0.0}
    ours = clt.step(step_input(clt, coefficients), Workspace())
    assert set(ours.losses) == {"mse_loss", "sparsity_loss"}
    got, want = gradients(clt, ours.loss), gradients(clt, defined_loss(clt, coefficients))
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12)


def test_steps_of_one_workspace_share_memory_and_say_so_when_backward_comes_too_late() -> None:
    clt, workspace = build("jumprelu"), Workspace()
    first = clt.step(step_input(clt), workspace)
    second = clt.step(step_input(clt), workspace)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first.hidden_pre, second.hidden_pre, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.loss.backward()


def test_every_call_from_saelens_has_tensors_of_its_own() -> None:
    clt = build("jumprelu")
    first = clt.training_forward_pass(step_input(clt))
    kept = first.feature_acts.clone()
    with torch.no_grad():
        clt.b_enc[0].add_(1.0)
    clt.training_forward_pass(step_input(clt))
    assert torch.equal(first.feature_acts, kept)
