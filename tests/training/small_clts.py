"""Small seeded CLTs in training, and steps to take with them."""

from __future__ import annotations

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput

from tl_clt.training.clt import TrainingCLT, TrainingCLTConfig
from tl_clt.training.data.batches import ActivationScale, apply_scale, estimate_scale

N_LAYERS, D, F, BATCH = 3, 8, 10, 7
COEFFICIENTS = {"sparsity": 0.7, "dead_feature": 0.2, "auxk": 0.3}


def raw_batch(n: int = BATCH) -> torch.Tensor:
    scale = torch.tensor([[0.1, 2.0, 30.0], [5.0, 0.7, 0.02]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 2, N_LAYERS, D, dtype=torch.float64, generator=generator) * scale[..., None]


def build(activation: str = "jumprelu", span: int = N_LAYERS, dtype: str = "float64", **changes) -> TrainingCLT:
    torch.manual_seed(3)
    scale = estimate_scale([raw_batch(50)])
    values = {
        "d_in": D,
        "d_sae": N_LAYERS * F,
        "n_layers": N_LAYERS,
        "d_transcoder": F,
        "activation": activation,
        "span": span,
        "k": 3 if activation in ("topk", "batchtopk") else None,
        "dtype": dtype,
        "input_scale": scale.inputs,
        "output_scale": scale.outputs,
    }
    clt = TrainingCLT(TrainingCLTConfig(**(values | changes)))
    with torch.no_grad():
        for parameter in (*clt.b_enc, clt.b_dec, *(clt.log_threshold or ())):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return clt


def scale_of(clt: TrainingCLT) -> ActivationScale:
    return ActivationScale(clt.cfg.input_scale, clt.cfg.output_scale)


def step_input(clt: TrainingCLT, coefficients: dict[str, float] = COEFFICIENTS) -> TrainStepInput:
    return TrainStepInput(apply_scale(raw_batch(), scale_of(clt)), coefficients, None, 0, True)


def trainer_config(n_tokens: int, batch: int, **changes: object) -> SAETrainerConfig:
    """Of SAELens's trainer."""
    values: dict = {
        "lr": 1e-2,
        "lr_end": 1e-3,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "lr_decay_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "device": "cpu",
        "autocast": False,
        "dead_feature_window": 1000,
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SAETrainerConfig(total_training_samples=n_tokens, train_batch_size_samples=batch, **(values | changes))
