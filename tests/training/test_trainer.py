"""`CLTTrainer` trains as SAELens's own trainer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from sae_lens.config import LoggingConfig
from sae_lens.training.sae_trainer import SAETrainer

from tests.training.small_clts import BATCH, N_LAYERS, D, F, build, raw_batch, scale_of, trainer_config
from tl_clt.training.clt import TrainingCLT
from tl_clt.training.data.batches import apply_scale
from tl_clt.training.fast import step as step_module
from tl_clt.training.run.trainer import CLTTrainer

STEPS = 12
SCHEDULES = {"lr_warm_up_steps": 3, "lr_decay_steps": 4, "dead_feature_window": 3}


def batches(clt: TrainingCLT) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        noise = torch.randn(*raw_batch().shape, dtype=torch.float64, generator=generator)
        yield apply_scale(raw_batch() + noise, scale_of(clt)).to(clt.dtype)


def trained(kind: type[SAETrainer], activation: str, **changes: object) -> SAETrainer:
    # Without AuxK: SAELens has another notion of dead features.
    clt = build(activation, sparsity_warm_up_steps=STEPS, auxk_coefficient=0.0)
    trainer = kind(trainer_config(STEPS * BATCH, BATCH, **(SCHEDULES | changes)), clt, batches(clt))
    trainer.fit()
    return trainer


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_weights_and_counts_are_those_of_saelens_trainer(activation: str, sparse_below: float, monkeypatch) -> None:
    monkeypatch.setitem(step_module.SPARSE_BELOW, "cpu", sparse_below)
    ours, theirs = trained(CLTTrainer, activation), trained(SAETrainer, activation)
    start = build(activation).state_dict()
    for name, value in theirs.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], value, rtol=1e-8, atol=1e-10)
        assert not torch.equal(value, start[name]), name
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.n_frac_active_samples == theirs.n_frac_active_samples == STEPS * BATCH
    # Means of counts, in float32 and summed in another order.
    assert ours.sae.cfg.metadata.l0 == pytest.approx(theirs.sae.cfg.metadata.l0, rel=1e-5)


def test_logs_are_those_of_saelens_trainer(monkeypatch) -> None:
    logs: dict[type, list[dict]] = {}
    for kind in (CLTTrainer, SAETrainer):
        rows = logs[kind] = []
        monkeypatch.setattr("wandb.log", lambda values, step, rows=rows: rows.append(values))
        trained(kind, "jumprelu", logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=5))
    assert len(logs[CLTTrainer]) == len(logs[SAETrainer]) == 2
    for ours, theirs in zip(logs[CLTTrainer], logs[SAETrainer], strict=True):
        # Dead is by running density with us, by steps since the last firing with SAELens.
        assert ours.pop("sparsity/dead_features") >= 0 <= theirs.pop("sparsity/dead_features")
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert ours["metrics/l0"] == pytest.approx(3 * ours["metrics/l0_mean_per_layer"])


def test_checkpoints_load_into_saelens_trainer_and_back(tmp_path) -> None:
    trainer = trained(CLTTrainer, "jumprelu")
    trainer.save_checkpoint("one", tmp_path)
    for kind in (SAETrainer, CLTTrainer):
        clt = TrainingCLT.load_from_disk(tmp_path / "one")
        again = kind(trainer_config(2 * STEPS * BATCH, BATCH, **SCHEDULES), clt, batches(clt))
        again.load_trainer_state(tmp_path / "one")
        again.fit()
        assert again.n_training_steps == 2 * STEPS


def run(activation: str, steps: int, window: int, data: Callable = batches, **changes: object) -> CLTTrainer:
    clt = build(activation, sparsity_warm_up_steps=steps // 2, **changes)
    if data is weak_batches:
        with torch.no_grad():
            for W_dec in clt.W_dec:
                W_dec[: F // 2] *= 1e-3
    cfg = trainer_config(steps * BATCH, BATCH, dead_feature_window=window, lr=3e-3, lr_warm_up_steps=3)
    trainer = CLTTrainer(cfg, clt, data(clt))
    trainer.fit()
    return trainer


@pytest.mark.parametrize("sparsity_loss", ["tanh", "l0"])
@pytest.mark.parametrize("target", [4.0, 6.0])
def test_target_l0_is_approached_in_every_layer_by_adjusting_its_lambda(sparsity_loss: str, target: float) -> None:
    """These outputs are noise: a layer whose features have fitted it lets go of them late."""
    trainer = run("jumprelu", 250, 48, sparsity_loss=sparsity_loss, target_l0=target)
    l0 = trainer.density.density.unflatten(0, (N_LAYERS, -1)).sum(dim=1)
    assert l0.tolist() == pytest.approx([target] * N_LAYERS, rel=0.5)
    assert float(l0.mean()) == pytest.approx(target, rel=0.25)
    assert trainer.controller is not None and trainer.sae.sparsity_shares is not None
    assert trainer.get_coefficients()["sparsity"] == pytest.approx(trainer.controller.value)


def test_quadratic_penalty_draws_l0_to_its_target_with_lambda_as_given() -> None:
    trainer = run("jumprelu", 250, 48, sparsity_loss="quadratic_l0", target_l0=4.0, sparsity_coefficient=300.0)
    assert float(trainer.density.density.sum()) / N_LAYERS == pytest.approx(4.0, rel=0.1)
    assert trainer.get_coefficients()["sparsity"] == 300.0


def weak_batches(clt: TrainingCLT) -> Iterator[torch.Tensor]:
    """Outputs that are a function of inputs, for a CLT of which half the features write next to nothing."""
    generator = torch.Generator().manual_seed(5)
    maps = torch.randn(N_LAYERS, D, D, dtype=torch.float64, generator=generator) / D**0.5
    while True:
        x = torch.randn(BATCH, N_LAYERS, D, dtype=torch.float64, generator=generator)
        yield torch.stack([x, torch.einsum("bld,lde->ble", x, maps).relu()], dim=1)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_auxk_brings_features_back_that_others_crowd_out(activation: str) -> None:
    dead = {}
    for coefficient in (0.0, 1.0):
        trainer = run(activation, 200, 16, weak_batches, auxk_coefficient=coefficient, k_aux=3, k=1)
        dead[coefficient] = int(trainer.dead_neurons.sum())
    assert dead[0.0] >= N_LAYERS * F / 3 and dead[1.0] < dead[0.0] / 2


def test_adam_is_fused() -> None:
    clt = build("jumprelu")
    trainer = CLTTrainer(trainer_config(STEPS * BATCH, BATCH, **SCHEDULES), clt, batches(clt))
    assert all(group["fused"] for group in trainer.optimizer.param_groups)
