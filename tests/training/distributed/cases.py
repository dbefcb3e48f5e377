"""What each rank does in the tests of runs over several processes, and the same on one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import wandb
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput

from tests.training.small_clts import trainer_config
from tl_clt.training.clt import TrainingCLT, TrainingCLTConfig
from tl_clt.training.fast import step as step_module
from tl_clt.training.fast.step import FastStep, layer_topk
from tl_clt.training.parallel import (
    SINGLE,
    ProcessGrid,
    is_shared,
    process_grid,
)
from tl_clt.training.run.checkpoints import gather_clt, own_share
from tl_clt.training.run.trainer import CLTTrainer, clip_divisor, combine_gradients, gradient_norm

N_LAYERS, D_MODEL, N_FEATURES, BATCH, STEPS = 3, 8, 12, 8, 10
COEFFICIENTS = {"sparsity": 0.7, "dead_feature": 0.2, "auxk": 0.5, "far_write": 0.3}
DEAD = torch.tensor([[1, 5, 6, 8], [2, 3, -1, -1], [-1, -1, -1, -1]])
"""Features of each layer that count as dead in `step`: on more ranks than one, on one, on none."""
MAX_NORM = 0.01

KINDS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "jumprelu, all": {"activation": "jumprelu", "straight_through": "all"},
    "jumprelu, threshold": {"activation": "jumprelu", "straight_through": "threshold"},
    "jumprelu, span 2": {"activation": "jumprelu", "span": 2},
    "relu, skip": {"activation": "relu", "skip": True},
    "jumprelu, far decoders of low rank": {"activation": "jumprelu", "far_rank": 2},
    "jumprelu, L0": {"activation": "jumprelu", "sparsity_loss": "l0"},
    "jumprelu, quadratic L0": {"activation": "jumprelu", "sparsity_loss": "quadratic_l0", "target_l0": 2.0},
    "jumprelu, target L0": {"activation": "jumprelu", "target_l0": 2.0},
    "topk": {"activation": "topk", "k": 5, "dead_feature_density": 0.4, "k_aux": 3},
    "topk, k 1": {"activation": "topk", "k": 1, "k_start": 4, "k_anneal_steps": 5},
    "topk across layers": {"activation": "topk", "k": 3, "topk_across": "all_layers", "far_rank": 2},
    "batchtopk": {"activation": "batchtopk", "k": 3, "dead_feature_density": 0.2, "k_aux": 2},
    "batchtopk across layers": {"activation": "batchtopk", "k": 3, "topk_across": "all_layers", "skip": True},
}
PRODUCTS = {"dense": 0.0, "sparse": 1.1}


class StepResult(NamedTuple):
    """Of the whole CLT and batch, as numpy arrays."""

    recons: Any
    losses: dict[str, float]
    fired: Any
    gradients: dict[str, Any]
    clipped: dict[str, Any]
    norm: float


def build(kind: str, grid: ProcessGrid = SINGLE, **changes: Any) -> TrainingCLT:
    torch.manual_seed(3)
    values = {
        "d_in": D_MODEL,
        "d_sae": N_LAYERS * N_FEATURES,
        "n_layers": N_LAYERS,
        "d_transcoder": N_FEATURES,
        "dtype": "float64",
        **KINDS[kind],
    }
    clt = TrainingCLT(TrainingCLTConfig(**(values | changes)), grid=grid)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in clt.named_parameters():
            if not name.startswith("W") or name.startswith("W_skip"):
                shape = parameter.shape if is_shared(name) else (N_FEATURES, *parameter.shape[1:])
                noise = torch.randn(shape, dtype=torch.float64, generator=generator)
                parameter.add_(own_share(name, noise, grid), alpha=0.2)
    return clt


def batch(seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 2, N_LAYERS, D_MODEL, dtype=torch.float64, generator=generator)


def own_tokens(tokens: torch.Tensor, grid: ProcessGrid) -> torch.Tensor:
    return tokens.chunk(grid.n_data_parallel)[grid.data_index]


def whole(name: str, own: torch.Tensor, grid: ProcessGrid) -> Any:
    return (own if is_shared(name) else grid.all_features(own, dim=0)).numpy(force=True).copy()


def step(kind: str, products: str, n_data_parallel: int = 1) -> StepResult:
    """One step's results, on as many processes as there are."""
    step_module.SPARSE_BELOW["cpu"] = PRODUCTS[products]
    with process_grid(n_data_parallel, "cpu") as grid:
        clt = build(kind, grid)
        dead = (torch.arange(N_FEATURES) == DEAD[..., None]).any(dim=1).flatten()
        result = clt.step(TrainStepInput(own_tokens(batch(), grid), COEFFICIENTS, dead, 9, False), FastStep())
        result.loss.backward()
        combine_gradients(clt, grid)
        losses = {name: value.detach().clone() for name, value in result.losses.items()}
        grid.mean_over_data(list(losses.values()))

        def gradients() -> dict[str, Any]:
            return {name: whole(name, p.grad, grid) for name, p in clt.named_parameters()}

        raw = gradients()
        norm = gradient_norm(clt, grid)
        for parameter in clt.parameters():
            parameter.grad /= clip_divisor(norm, MAX_NORM)
        return StepResult(
            recons=grid.all_tokens(result.recons.detach()).numpy(),
            losses={name: float(value) for name, value in losses.items()},
            fired=clt.count_firing(result).numpy(),
            gradients=raw,
            clipped=gradients(),
            norm=float(norm),
        )


def logs(kind: str, n_data_parallel: int = 1) -> tuple[list[dict[str, float]], Any]:
    """What SAELens logs while training, and the decoder norms that it makes a histogram of."""
    rows: list[dict[str, float]] = []
    log, wandb.log = wandb.log, lambda values, step: rows.append(values)
    try:
        with process_grid(n_data_parallel, "cpu") as grid:
            clt = build(kind, grid)
            batches = (own_tokens(batch(n), grid) for n in range(STEPS))
            logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=5)
            CLTTrainer(replace(short_run(), logger=logger), clt, batches).fit()
            return rows, clt.log_histograms()["weights/W_dec_norms"]
    finally:
        wandb.log = log


def short_run() -> SAETrainerConfig:
    return trainer_config(STEPS * BATCH, BATCH, lr_warm_up_steps=2, lr_decay_steps=2, dead_feature_window=2)


class Trained(NamedTuple):
    """A CLT after some steps, and the trainer's counts."""

    weights: dict[str, Any]
    counts: dict[str, Any]
    last_losses: dict[str, float]


def train(kind: str, n_data_parallel: int = 1, changes: dict[str, Any] | None = None) -> Trained:
    with process_grid(n_data_parallel, "cpu") as grid:
        clt = build(kind, grid, sparsity_warm_up_steps=STEPS, **(changes or {}))

        def batches() -> Iterator[torch.Tensor]:
            for n in range(STEPS):
                yield own_tokens(batch(n), grid).to(clt.dtype)

        trainer = CLTTrainer(short_run(), clt, batches())
        trainer.fit()
        return Trained(
            weights={
                name: whole(name, p.float() if p.dtype == torch.bfloat16 else p, grid)
                for name, p in clt.state_dict().items()
            },
            counts={
                "act_freq_scores": trainer.act_freq_scores.numpy(),
                "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired.numpy(),
                "n_training_samples": trainer.n_training_samples,
                "n_frac_active_samples": trainer.n_frac_active_samples,
                "l0": clt.cfg.metadata.l0,
                "dead_neurons": trainer.dead_neurons.numpy(),
                "coefficients": list(trainer.get_coefficients().values()),
            },
            last_losses={name: float(value) for name, value in clt.last_losses.items()},
        )


def fresh_weights(kind: str, n_data_parallel: int = 1) -> dict[str, Any]:
    with process_grid(n_data_parallel, "cpu") as grid:
        clt = build(kind, grid)
        return {name: whole(name, p, grid) for name, p in clt.named_parameters()}


def gathered(kind: str, n_data_parallel: int = 1) -> tuple[str, dict[str, Any]]:
    """Device and values of the whole CLT, as each rank gets it."""
    with process_grid(n_data_parallel, "cpu") as grid:
        clt = gather_clt(build(kind, grid))
        on_cpu = clt.b_dec.device.type == "cpu"
        return clt.b_dec.device.type, {n: p.numpy(force=True) for n, p in clt.named_parameters()} if on_cpu else {}


def kept_by_topk(hidden_pre: Any, k: int) -> list[tuple[int, int]]:
    """(token, feature) of what a top-k keeps of this rank's share, features numbered over all ranks."""
    with process_grid(1, "cpu") as grid:
        own = grid.own(hidden_pre.shape[1])
        places = layer_topk(torch.from_numpy(hidden_pre)[:, own], k, grid).places
        return [(int(t), int(f) + own.start) for t, f in zip(places.tokens, places.features, strict=True)]


def refused(n_features: int, n_data_parallel: int) -> str:
    """The message of a grid that does not fit."""
    from tl_clt.errors import ConfigError

    try:
        with process_grid(n_data_parallel, "cpu") as grid:
            TrainingCLT(replace(build("relu").cfg, d_transcoder=n_features, d_sae=N_LAYERS * n_features), grid=grid)
    except ConfigError as error:
        return str(error)
    return "accepted"
