"""The fast step against its definition, `define_step`, in float64."""

from __future__ import annotations

import multiprocessing as mp
import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
from sae_lens.saes.sae import TrainStepInput
from torch.nn.parallel import DistributedDataParallel

from tests.training.small_clts import BATCH, COEFFICIENTS, N_LAYERS, F, build, step_input
from tl_clt.errors import ConfigError
from tl_clt.training.clt import TrainingCLT, define_step
from tl_clt.training.fast import step as step_module
from tl_clt.training.fast.step import FastStep

KINDS = {
    "relu": {"activation": "relu"},
    "jumprelu, all": {"activation": "jumprelu", "straight_through": "all"},
    "jumprelu, threshold": {"activation": "jumprelu", "straight_through": "threshold"},
    "jumprelu, l0, all": {"activation": "jumprelu", "sparsity_loss": "l0"},
    "jumprelu, l0, threshold": {"activation": "jumprelu", "sparsity_loss": "l0", "straight_through": "threshold"},
    "jumprelu, quadratic": {"activation": "jumprelu", "sparsity_loss": "quadratic_l0", "target_l0": 2.0},
    "topk": {"activation": "topk"},
    "topk, all layers": {"activation": "topk", "topk_across": "all_layers"},
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk, all layers": {"activation": "batchtopk", "topk_across": "all_layers"},
}
SHAPES = {
    "clt": {},
    "plt": {"span": 1},
    "span 2": {"span": 2},
    "skip": {"skip": True},
    "low rank": {"far_rank": 2},
    "low rank, span 2, skip": {"far_rank": 3, "span": 2, "skip": True},
}
SPARSE = {"dense": 0.0, "sparse": 1.1}


def with_dead(clt: TrainingCLT, share: float = 0.4) -> TrainStepInput:
    """A step at which some features count as dead, among them none of layer 0."""
    given = step_input(clt)
    given.dead_neuron_mask = torch.rand(clt.cfg.d_sae, generator=torch.Generator().manual_seed(6)) < share
    given.dead_neuron_mask[:F] = False
    return given


def gradients(clt: TrainingCLT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    grads = {name: p.grad.clone() for name, p in clt.named_parameters() if p.grad is not None}
    clt.zero_grad(set_to_none=True)
    return grads


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(params=SPARSE)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products over all features, or over active ones only; blocks of two tokens."""
    monkeypatch.setitem(step_module.SPARSE_BELOW, "cpu", SPARSE[request.param])
    monkeypatch.setitem(step_module.BLOCK_ELEMENTS, "cpu", 20)
    return request.param


@pytest.mark.parametrize(("kind", "shape"), product(KINDS, SHAPES))
def test_loss_and_every_gradient_are_those_of_the_definition(products: str, kind: str, shape: str) -> None:
    clt = build(**KINDS[kind], **SHAPES[shape])
    ours, defined = clt.step(step_input(clt), FastStep()), define_step(clt, step_input(clt))
    torch.testing.assert_close(ours.loss, defined.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.recons, defined.recons, rtol=1e-11, atol=1e-12)
    assert ours.losses.keys() == defined.losses.keys()
    got, want = gradients(clt, ours.loss), gradients(clt, defined.loss)
    assert got.keys() == dict(clt.named_parameters()).keys()
    assert_same_gradients(got, want)


@pytest.mark.parametrize(("kind", "shape"), product([k for k in KINDS if "quadratic" not in k], SHAPES))
@pytest.mark.parametrize("k_aux", [2, 9])
def test_auxk_is_that_of_the_definition(products: str, kind: str, shape: str, k_aux: int) -> None:
    clt = build(**KINDS[kind], **SHAPES[shape], k_aux=k_aux)
    ours, defined = clt.step(with_dead(clt), FastStep()), define_step(clt, with_dead(clt))
    torch.testing.assert_close(ours.losses["auxk_loss"], defined.losses["auxk_loss"], rtol=1e-12, atol=0)
    assert_same_gradients(gradients(clt, ours.loss), gradients(clt, defined.loss))


@pytest.mark.parametrize(("kind", "shape"), product(KINDS, ["clt", "span 2", "low rank", "low rank, span 2, skip"]))
def test_far_writes_cost_what_the_definition_says(products: str, kind: str, shape: str) -> None:
    clt = build(**KINDS[kind], **SHAPES[shape])
    coefficients = {**COEFFICIENTS, "far_write": 0.3}
    ours = clt.step(step_input(clt, coefficients), FastStep())
    defined = define_step(clt, step_input(clt, coefficients))
    assert float(defined.losses["far_write_loss"]) > 0
    torch.testing.assert_close(ours.losses["far_write_loss"], defined.losses["far_write_loss"], rtol=1e-11, atol=0)
    torch.testing.assert_close(ours.loss, defined.loss, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(clt, ours.loss), gradients(clt, defined.loss))


def test_per_layer_transcoders_have_no_far_writes() -> None:
    clt = build("jumprelu", span=1)
    for step in (FastStep(), define_step):
        result = step(clt, step_input(clt, {**COEFFICIENTS, "far_write": 0.3}))
        assert float(result.losses["far_write_loss"]) == 0
        result.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in clt.parameters())


def test_auxk_reaches_dead_features_and_no_encoder_of_the_others() -> None:
    clt = build("topk", k_aux=2)
    given = with_dead(clt)
    clt.step(given, FastStep()).losses["auxk_loss"].backward()
    dead = given.dead_neuron_mask.unflatten(0, (N_LAYERS, F))
    touched = torch.stack([b.grad != 0 for b in clt.b_enc[1:]])
    assert clt.b_enc[0].grad is None
    assert touched.any() and not (touched & ~dead[1:]).any()


def test_without_dead_features_auxk_costs_nothing() -> None:
    clt = build("topk")
    given = step_input(clt)
    given.dead_neuron_mask = torch.zeros(clt.cfg.d_sae, dtype=torch.bool)
    assert set(clt.step(given, FastStep()).losses) == {"mse_loss"}


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_k_falls_from_k_start(activation: str) -> None:
    clt = build(activation, k=2, k_start=8, k_anneal_steps=4)
    for step, k in enumerate([8, 6, 5, 4, 2, 2]):
        given = step_input(clt)
        given.n_training_steps = step
        k_now = 8 - 1.5 * step if step < 4 else 2
        assert k == round(k_now) == clt.cfg.k_at(step)
        defined = define_step(clt, given)
        assert int((torch.stack([f.dense() for f in defined.features]) != 0).sum()) <= N_LAYERS * BATCH * k
        torch.testing.assert_close(clt.step(given, FastStep()).loss, defined.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_over_backward_passes(products: str, kind: str) -> None:
    clt = build(**KINDS[kind], k_aux=2)
    want = gradients(clt, clt.step(with_dead(clt), FastStep()).loss)
    fast = FastStep()
    for _ in range(3):
        clt.step(with_dead(clt), fast).loss.backward()
    for name, parameter in clt.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * want[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_firing_counts_are_those_of_the_definition(products: str, kind: str) -> None:
    clt = build(**KINDS[kind])
    ours = clt.step(step_input(clt), FastStep())
    acts, hidden_pre = clt.encode_with_hidden_pre(step_input(clt).sae_in[:, 0])
    defined = define_step(clt, step_input(clt))
    torch.testing.assert_close(acts, torch.cat([f.dense() for f in defined.features], dim=1))
    torch.testing.assert_close(torch.cat([f.dense() for f in ours.features], dim=1), acts)
    torch.testing.assert_close(torch.cat(ours.hidden_pre, dim=1), hidden_pre)
    assert torch.equal(ours.fired, (acts > 0).sum(dim=0))
    assert torch.equal(defined.fired, ours.fired)
    assert (ours.smallest_kept is None) == (defined.smallest_kept is None)
    if defined.smallest_kept is not None:
        torch.testing.assert_close(ours.smallest_kept, defined.smallest_kept)


def test_no_dead_feature_loss_where_its_coefficient_is_zero() -> None:
    clt = build("jumprelu")
    coefficients = {"sparsity": 0.7, "dead_feature": 0.0}
    ours = clt.step(step_input(clt, coefficients), FastStep())
    assert set(ours.losses) == {"mse_loss", "sparsity_loss"}
    defined = define_step(clt, step_input(clt, coefficients))
    assert_same_gradients(gradients(clt, ours.loss), gradients(clt, defined.loss))


def test_steps_of_one_run_share_memory_and_say_so_when_backward_comes_too_late() -> None:
    clt, fast = build("jumprelu"), FastStep()
    first = clt.step(step_input(clt), fast)
    second = clt.step(step_input(clt), fast)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first.hidden_pre, second.hidden_pre, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_asked_for_are_those_of_the_definition(products: str, kind: str) -> None:
    clt = build(**KINDS[kind])
    for parameter in clt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights = list(clt.parameters())
    got = torch.autograd.grad(clt.step(step_input(clt), FastStep()).loss, weights)
    want = torch.autograd.grad(define_step(clt, step_input(clt)).loss, weights)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not any(parameter.grad.any() for parameter in weights)


class Wrapped(torch.nn.Module):
    """What someone might give to DistributedDataParallel."""

    def __init__(self, clt: TrainingCLT) -> None:
        super().__init__()
        self.clt = clt

    def forward(self, given: TrainStepInput, fast: bool) -> torch.Tensor:
        return (self.clt.step(given, FastStep()) if fast else self.clt.step(given)).loss


def within_distributed_data_parallel() -> None:
    clt = build("jumprelu")
    want = gradients(clt, define_step(clt, step_input(clt)).loss)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel = DistributedDataParallel(Wrapped(clt))
    with pytest.raises(ConfigError, match="does not see them: train with CLTTrainingRunner"):
        parallel(step_input(clt), fast=True)
    assert_same_gradients(gradients(clt, parallel(step_input(clt), fast=False)), want)
    os._exit(0)


def test_within_distributed_data_parallel_the_fast_step_is_refused_and_the_definition_works() -> None:
    # In a process that ends before the wrapper does: its end holds the interpreter's lock while it waits for gloo's
    # thread, which may wait for that lock (torch 2.13), for ever.
    process = mp.get_context("spawn").Process(target=within_distributed_data_parallel)
    process.start()
    process.join(timeout=300)
    ended = not process.is_alive()
    process.kill()
    assert ended and process.exitcode == 0


def test_every_call_from_saelens_has_tensors_of_its_own() -> None:
    clt = build("jumprelu")
    first = clt.training_forward_pass(step_input(clt))
    kept = first.feature_acts.clone()
    with torch.no_grad():
        clt.b_enc[0].add_(1.0)
    clt.training_forward_pass(step_input(clt))
    assert torch.equal(first.feature_acts, kept)
