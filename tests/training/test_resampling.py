"""Dead features begin anew as detectors of tokens that are reconstructed badly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.conftest import config, tiny_model
from tests.training.distributed.runs import tokens as tokens_of_runs
from tests.training.small_clts import BATCH, N_LAYERS, D, F, build, trainer_config
from tests.training.test_trainer import weak_batches
from tl_clt.training import CLTTrainingRunner
from tl_clt.training.clt import TrainingCLT
from tl_clt.training.resampling import FIRING, SIZE, TOKENS_PER_FEATURE, resample
from tl_clt.training.run import trainer as trainer_module
from tl_clt.training.run.trainer import BLOCKS, CLTTrainer, RunningDensity

N = 200


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, e = torch.randn(2, N, N_LAYERS, D, dtype=torch.float64, generator=generator)
    return x, e


def moments_of(clt: TrainingCLT) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    return {p: {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.rand_like(p)} for p in clt.parameters()}


def some_dead() -> torch.Tensor:
    dead = torch.zeros(N_LAYERS * F, dtype=torch.bool)
    dead[[1, 4, F, 2 * F + 9]] = True
    return dead


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("span", [1, N_LAYERS])
def test_a_new_feature_fires_most_at_its_token_and_writes_along_its_error(activation: str, span: int) -> None:
    clt, (x, e), dead = build(activation, span), tokens(), some_dead()
    begun = resample(clt, moments_of(clt), dead, x, e, seed=0)
    assert torch.equal(begun, dead)
    for layer, targets in enumerate(clt.targets):
        for i in dead[layer * F : (layer + 1) * F].nonzero().flatten().tolist():
            h = (x[:, layer] @ clt.W_enc[layer][i] + clt.b_enc[layer][i]).detach()
            theta = clt.thresholds()[layer][i].detach()
            # It writes along one token's error, at most SIZE of its length, and fires at that token.
            errors = torch.cat([e[:, target] for target in targets], dim=1)
            W_dec = clt.W_dec[layer][i].detach()
            token = int(torch.cosine_similarity(W_dec[None], errors).argmax())
            torch.testing.assert_close(W_dec * h.max(), SIZE * errors[token])
            assert float(h[token]) > float(theta) and float((h > theta).double().mean()) >= FIRING / 2
            assert float((h > h[token]).double().mean()) < 0.2


def test_what_is_alive_stays_as_it_is_and_adam_forgets_what_it_knew_of_the_dead() -> None:
    clt, before, (x, e), dead = build("jumprelu"), build("jumprelu"), tokens(), some_dead()
    moments = moments_of(clt)
    squares = {p: state["exp_avg_sq"].clone() for p, state in moments.items()}
    resample(clt, moments, dead, x, e, seed=0)
    for layer in range(N_LAYERS):
        of_layer = dead[layer * F : (layer + 1) * F]
        for name in ("W_enc", "b_enc", "W_dec", "log_threshold"):
            weight, old = getattr(clt, name)[layer], getattr(before, name)[layer]
            assert torch.equal(weight[~of_layer], old[~of_layer]), name
            assert name == "log_threshold" or not torch.equal(weight[of_layer], old[of_layer]), name
            state = moments[weight]
            assert (state["exp_avg"][of_layer] == 0).all() and (state["exp_avg"][~of_layer] == 1).all()
            assert torch.equal(state["exp_avg_sq"][~of_layer], squares[weight][~of_layer])
            usual = squares[weight][~of_layer].mean(dim=0).expand_as(state["exp_avg_sq"][of_layer])
            torch.testing.assert_close(state["exp_avg_sq"][of_layer], usual)


def test_tokens_are_drawn_by_their_squared_error_and_alike_for_the_same_seed() -> None:
    (x, e), dead = tokens(), some_dead()
    e[:] = 0.0
    e[[3, 50, 120]] = 1.0
    one, other = build("topk"), build("topk")
    for clt in (one, other):
        resample(clt, moments_of(clt), dead, x, e, seed=7)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    # It writes along the error that the three tokens have.
    W_dec = one.W_dec[0][1].detach()
    torch.testing.assert_close(W_dec, W_dec.mean().expand_as(W_dec))


def test_too_few_tokens_begin_only_so_many_and_none_where_nothing_is_left_to_explain() -> None:
    clt, (x, e) = build("topk"), tokens()
    dead = torch.ones(N_LAYERS * F, dtype=torch.bool)
    few = 3 * TOKENS_PER_FEATURE
    assert int(resample(clt, moments_of(clt), dead, x[:few], e[:few], seed=0).sum()) == 3 * N_LAYERS
    assert not resample(clt, moments_of(clt), dead, x, torch.zeros_like(e), seed=0).any()


def test_low_rank_decoders_keep_what_they_write_to_later_layers() -> None:
    clt, before, (x, e), dead = (*(build("topk", far_rank=2) for _ in range(2)), tokens(), some_dead())
    resample(clt, moments_of(clt), dead, x, e, seed=0)
    assert torch.equal(clt.W_dec[0][:, D:], before.W_dec[0][:, D:])
    assert not torch.equal(clt.W_dec[0][1, :D], before.W_dec[0][1, :D])


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_run_has_fewer_dead_features_with_it(activation: str) -> None:
    dead = {}
    for on in (False, True):
        clt = build(activation, auxk_coefficient=0.0, k=1)
        with torch.no_grad():
            for W_dec in clt.W_dec:
                W_dec[: F // 2] *= 1e-3
        cfg = trainer_config(200 * BATCH, BATCH, dead_feature_window=16, lr=3e-3, lr_warm_up_steps=3)
        trainer, data = CLTTrainer(cfg, clt, weak_batches(clt)), weak_batches(clt)
        if on:
            trainer.upcoming = lambda data=data: torch.cat([next(data) for _ in range(30)])
        trainer.fit()
        dead[on] = int(trainer.dead_neurons.sum())
    assert dead[False] >= N_LAYERS * F / 3 and dead[True] < dead[False] / 2


@pytest.mark.parametrize("on", [True, False])
def test_a_run_looks_ahead_once_a_window_for_two_thirds_of_it(on: bool, monkeypatch) -> None:
    seen: list[int] = []

    def note(clt, moments, dead, inputs, errors, seed):
        assert inputs.shape == errors.shape and len(inputs) == 64 * 2 and inputs.isfinite().all()
        seen.append(seed)
        return torch.zeros_like(dead)

    monkeypatch.setattr(trainer_module, "resample", note)
    monkeypatch.setattr(trainer_module.RunningDensity, "dead", lambda self, below: self.fired[0] >= 0)
    changes = {"training_tokens": 64 * 24, "n_batches_for_scale": 2, "dead_feature_window": 3, "resample_dead": on}
    run = CLTTrainingRunner(config(**changes), model=tiny_model(), dataset=tokens_of_runs())
    run.run()
    assert run.record is not None and run.record.tokens_seen == 64 * 24
    assert seen == ([3, 6, 9, 12, 15] if on else [])


def test_what_began_anew_counts_as_alive_for_a_window() -> None:
    running = RunningDensity(2, window=2 * BLOCKS, device="cpu")
    for _ in range(2 * BLOCKS):
        running.add(torch.tensor([0, 0]), 10)
    running.forgive(torch.tensor([True, False]))
    assert running.dead(1e-6).tolist() == [False, True]
    for _ in range(2 * BLOCKS):
        running.add(torch.tensor([0, 0]), 10)
    assert running.dead(1e-6).tolist() == [True, True]


def test_features_that_begin_together_write_no_more_than_the_error() -> None:
    """As hundreds do in each layer of a real model early on."""
    n_layers, f = 12, 128
    generator = torch.Generator().manual_seed(5)
    x, e = (torch.randn(1024, n_layers, D, generator=generator, dtype=torch.float64) for _ in range(2))
    shape: dict[str, Any] = {"d_in": D, "d_sae": n_layers * f, "n_layers": n_layers, "d_transcoder": f}
    ones = (1.0,) * n_layers
    clt = build("relu", n_layers, **shape, input_scale=ones, output_scale=ones)
    resample(clt, {}, torch.ones(n_layers * f, dtype=torch.bool), x, e, seed=0)
    written = torch.zeros_like(e)
    for layer, targets in enumerate(clt.targets):
        acts = (x[:, layer] @ clt.W_enc[layer].T + clt.b_enc[layer]).relu().detach()
        out = (acts @ clt.W_dec[layer].detach()).unflatten(1, (len(targets), D))
        written[:, list(targets)] += out
    shares = (written.square().sum(dim=(0, 2)) / e.square().sum(dim=(0, 2))).sqrt()
    assert shares.max() < 1
    assert shares.max() > 0.1
