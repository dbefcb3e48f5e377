"""Transcoders to be judged: of a known circuit, trained on all its prompts at once, or of a trained organism.

On a circuit each step is `define_step`, the package's definition of a training step, on all prompts at the position of
the answer; lambda rises linearly over the run, and Adam's rate falls to 0 over its last fifth. 1,500 steps take 3 to 8
seconds. On an organism it is `CLTTrainingRunner` on the organism's text, `BATCH` tokens a step.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.benchmark.hops import activations, neurons_as_transcoder
from tl_clt.lens import HookedModel, block_hook, run_with_cache
from tl_clt.organisms import SPARE_TOKENS, KnownCircuit, training_tokens
from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig
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
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig

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
    batch = torch.stack(activations(circuit, neurons_as_transcoder(circuit)), dim=1)
    if activation == "topk":
        settings["k"] = int(sparsity)
    clt, batch = _start(batch, FEATURES, seed, start, span=span, activation=activation, **settings)
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


BATCH = 256
"""Tokens a step on an organism."""
OF_ORGANISM = {"atlas": 256, "school": 512}
"""Features a layer of each organism's transcoders, as in those that are bundled."""


def features_of(judge: str) -> int:
    """Features of a layer that transcoders trained on a judge have."""
    return OF_ORGANISM.get(judge, FEATURES)


def train_on_organism(
    name: str,
    model: HookedModel,
    span: int,
    sparsity: float | int,
    seed: int,
    *,
    activation: Literal["jumprelu", "topk"] = "jumprelu",
    n_steps: int = STEPS,
    **settings: Any,
) -> CrossLayerTranscoder:
    """A CLT of a trained organism, trained on its text by `CLTTrainingRunner`.

    Args:
        name: the organism.
        model: its model.
        span: layers that a feature writes to; 1 for PLTs.
        sparsity: `sparsity_coefficient`; of "topk" k.
        seed: of the weights and the text.
        activation: "jumprelu" with the tanh penalty, or "topk".
        n_steps: how long; 0 for a CLT of chance, whose biases alone are fitted to the activations.
        settings: further fields of `CLTTrainingRunnerConfig`, and other values of those that are set here.
    """
    n_tokens = n_steps * BATCH
    tokens = training_tokens(name, model, n_tokens + SPARE_TOKENS, seed)
    if n_steps == 0:
        batch = _organism_activations(model, tokens[:64])
        return export(_start(batch, OF_ORGANISM[name], seed, "random", span=span, activation=activation)[0])
    sparse = {"k": int(sparsity)} if activation == "topk" else {"sparsity_coefficient": float(sparsity)}
    config = CLTTrainingRunnerConfig.from_dict(
        {
            "model_name": name,
            "d_transcoder": OF_ORGANISM[name],
            "auxk_coefficient": 1.0,
            "activation": activation,
            "span": span,
            "training_tokens": n_tokens,
            "context_size": model.cfg.n_ctx,
            "train_batch_size_tokens": BATCH,
            "lr": 2e-3,
            "lr_warm_up_steps": min(WARM_UP, n_steps // 4),
            "lr_decay_steps": n_steps // 4,
            "seed": seed,
            **sparse,
            **settings,
        }
    )
    return CLTTrainingRunner(config, model=model, dataset=tokens).run()


def _organism_activations(
    model: HookedModel, tokens: Int[Tensor, "n_prompts context"]
) -> Float[Tensor, "batch 2 n_layers d_model"]:
    """What MLPs read and write, position 0 left out."""
    defaults = CrossLayerTranscoderConfig(n_layers=1, d_model=1, d_transcoder=1)
    hooks = [
        [block_hook(layer, name) for layer in range(model.cfg.n_layers)]
        for name in (defaults.input_hook, defaults.output_hook)
    ]
    _, cache = run_with_cache(model, tokens, lambda name: name in hooks[0] + hooks[1])
    both = [torch.stack([cache[name] for name in names], dim=2)[:, 1:].flatten(0, 1) for names in hooks]
    return torch.stack(both, dim=1)


def _start(
    batch: Float[Tensor, "batch 2 n_layers d_model"],
    d_transcoder: int,
    seed: int,
    start: Literal["random", "tokens"],
    **settings: Any,
) -> tuple[TrainingCLT, Float[Tensor, "batch 2 n_layers d_model"]]:
    """A CLT before its first step, and the activations in its scale."""
    scale = estimate_scale([batch])
    batch = apply_scale(batch, scale)
    torch.manual_seed(seed)
    _, _, n_layers, d_model = batch.shape
    clt = TrainingCLT(
        TrainingCLTConfig(
            d_in=d_model,
            d_sae=n_layers * d_transcoder,
            n_layers=n_layers,
            d_transcoder=d_transcoder,
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
    return clt, batch
