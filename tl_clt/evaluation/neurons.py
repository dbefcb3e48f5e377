"""The model's own neurons as a transcoder: the baseline that papers hold CLTs against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.errors import ConfigError
from tl_clt.lens import HookedModel, block_hook, dtype_of, model_name, neuron_weights, run_with_cache, user_hooks_aside
from tl_clt.lens.neurons import NORMALISED
from tl_clt.shapes import TokenBatch
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig


class ThresholdedNeurons(CrossLayerTranscoder):
    """Each neuron a feature that writes to its own layer (span 1): a neuron of which |activation| is above its
    threshold keeps its activation, others are 0. With all thresholds below 0 it is the model's MLPs exactly."""

    def __init__(self, model: HookedModel, threshold: Float[Tensor, "n_layers d_mlp"]) -> None:
        """Take the model's neurons.

        Raises:
            ModelUnsupported: the MLPs are not of plain neurons, as gated ones.
        """
        layers = [neuron_weights(model, layer) for layer in range(model.cfg.n_layers)]
        cfg = CrossLayerTranscoderConfig(
            n_layers=model.cfg.n_layers,
            d_model=model.cfg.d_model,
            d_transcoder=layers[0].W_in.shape[1],
            span=1,
            activation="jumprelu",
            input_hook=NORMALISED,
            model_name=model_name(model),
            dtype=str(dtype_of(model)).removeprefix("torch."),
        )
        super().__init__(cfg)
        self.act_fns = [layer.act_fn for layer in layers]
        with torch.no_grad():
            self.W_enc.copy_(torch.stack([layer.W_in for layer in layers]))
            self.b_enc.copy_(torch.stack([layer.b_in for layer in layers]))
            self.b_dec.copy_(torch.stack([layer.b_out for layer in layers]))
            assert self.threshold is not None
            self.threshold.copy_(threshold.to(self.W_enc))
            for source, layer in enumerate(layers):
                self.W_dec[source].copy_(layer.W_out[:, None])
        self.requires_grad_(False)

    def activate(
        self, hidden_pre: Float[Tensor, "*batch d_transcoder"], layer: int
    ) -> Float[Tensor, "*batch d_transcoder"]:
        """The neurons' own activation function, and 0 up to the threshold."""
        assert self.threshold is not None
        acts = self.act_fns[layer](hidden_pre)
        return acts * (acts.abs() > self.threshold[layer])


@torch.no_grad()
def thresholded_neurons(
    model: HookedModel, batches: Iterable[TokenBatch], l0s: Sequence[float | int]
) -> dict[float | int, ThresholdedNeurons]:
    """For each L0 (mean per layer), thresholds that let about so many neurons a layer through on some text.

    What a neuron writes, |activation| * ||W_out||, is compared with one number a layer, a quantile over the text.

    Args:
        batches: text on which the thresholds are found; position 0 is left out.

    Raises:
        ModelUnsupported: the MLPs are not of plain neurons.
        ConfigError: an L0 is not between 0 and the number of neurons.
    """
    layers = range(model.cfg.n_layers)
    weights = [neuron_weights(model, layer) for layer in layers]
    d_mlp = weights[0].W_in.shape[1]
    for l0 in l0s:
        if not 0 < l0 <= d_mlp:
            raise ConfigError(f"An L0 of {l0} is asked for, but a layer has {d_mlp} neurons: give 1 to {d_mlp}.")
    names = {block_hook(layer, NORMALISED) for layer in layers}
    with user_hooks_aside(model):
        caches = [run_with_cache(model, tokens, lambda name: name in names)[1] for tokens in batches]
    norms = torch.stack([layer.W_out.norm(dim=-1) for layer in weights])
    limits: dict[float | int, list[Tensor]] = {l0: [] for l0 in l0s}
    for layer in layers:
        w = weights[layer]
        x = torch.cat([cache[block_hook(layer, NORMALISED)][:, 1:].flatten(0, 1) for cache in caches])
        written = (w.act_fn(x @ w.W_in + w.b_in).abs() * norms[layer]).flatten().sort(descending=True).values
        for l0, found in limits.items():
            count = round(l0 * len(x))
            found.append(written[count] if count < len(written) else -torch.ones_like(written[0]))
    return {
        l0: ThresholdedNeurons(model, torch.stack(found)[:, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny))
        for l0, found in limits.items()
    }
