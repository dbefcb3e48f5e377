"""Transcoders of a known circuit: trained on all its prompts at once, or its neurons with thresholds.

Each step is `define_step`, the package's definition of a training step, on all prompts at the position of the answer;
lambda rises linearly over the run, and Adam's rate falls to 0 over its last fifth. 1,500 steps take 3 to 8 seconds.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from tl_clt.benchmark.hops import activations, neurons_as_transcoder
from tl_clt.organisms import KnownCircuit
from tl_clt.training.clt import (
    TrainingCLT,
    TrainingCLTConfig,
    TrainStepInput,
    define_step,
    init_decoder_biases,
    init_encoder_biases,
    init_from_tokens,
)
from tl_clt.training.data.batches import apply_scale, estimate_scale
from tl_clt.training.export import export
from tl_clt.transcoder import CrossLayerTranscoder

FEATURES, STEPS, LR, WARM_UP = 32, 1500, 4e-3, 50


def train_on_circuit(
    circuit: KnownCircuit,
    span: int,
    sparsity: float | int,
    seed: int,
    *,
    activation: Literal["jumprelu", "topk"] = "jumprelu",
    start: Literal["random", "tokens"] = "random",
    n_steps: int = STEPS,
    **settings: Any,
) -> CrossLayerTranscoder:
    """A CLT of a known circuit, trained on all its prompts at once.

    Args:
        circuit: the model and its prompts.
        span: layers that a feature writes to; 1 for PLTs.
        sparsity: lambda at the end of the run; of "topk" k, the features of a layer that are active at most.
        seed: of the weights.
        activation: "jumprelu" with the tanh penalty, or "topk".
        start: of the weights: "random", or "tokens" as `init_from_tokens` has them.
        n_steps: how long; 0 for a CLT of chance.
        settings: further fields of `TrainingCLTConfig`.
    """
    cfg = circuit.model.cfg
    batch = torch.stack(activations(circuit, neurons_as_transcoder(circuit)), dim=1)
    scale = estimate_scale([batch])
    batch = apply_scale(batch, scale)
    torch.manual_seed(seed)
    if activation == "topk":
        settings["k"] = int(sparsity)
    clt = TrainingCLT(
        TrainingCLTConfig(
            d_in=cfg.d_model,
            d_sae=cfg.n_layers * FEATURES,
            n_layers=cfg.n_layers,
            d_transcoder=FEATURES,
            span=span,
            activation=activation,
            dtype="float32",
            input_scale=scale.inputs,
            output_scale=scale.outputs,
            **settings,
        )
    )
    if start == "tokens":
        init_from_tokens(clt, batch[:, 0], batch[:, 1])
    else:
        init_encoder_biases(clt, batch[:, 0])
        init_decoder_biases(clt, batch[:, 1])
    adam = torch.optim.Adam(clt.parameters(), lr=LR)
    constant = {"dead_feature": clt.cfg.dead_feature_coefficient}
    constant["far_write"] = settings.get("far_write_coefficient", 0.0)
    for step in range(n_steps):
        for group in adam.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARM_UP, 5 * (n_steps - step) / n_steps)
        coefficients = constant | {"sparsity": sparsity * (step + 1) / n_steps}
        adam.zero_grad(set_to_none=True)
        define_step(clt, TrainStepInput(batch, coefficients, None, step, False)).loss.backward()
        adam.step()
    return export(clt)
