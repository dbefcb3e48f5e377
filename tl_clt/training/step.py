"""One training step's forward pass: what `CLTLayers` and `losses` define, at the speed that training needs.

Which products run over active features only is chosen by their measured density; the results are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.training.losses import mse_loss
from tl_clt.training.products import decode, decode_places, encode, pick, row_norms, sum_by_target
from tl_clt.training.selection import topk_places
from tl_clt.training.sparse import Support, support_of_dense
from tl_clt.training.terms import TermOptions, terms

if TYPE_CHECKING:
    from tl_clt.training.training_clt import TrainingCLT

SPARSE_BELOW = {"cpu": 0.1}
"""Share of active features below which sparse products are faster, by kind of device. Measured on two cores with
AVX-512: at 10% they take half the time of dense ones, at 20% as much."""
SPARSE_BELOW_ELSEWHERE = 0.01


class LayerFeatures(NamedTuple):
    """One layer's activations at a batch of tokens, with gradients: of the rank's own features at its own tokens."""

    acts: Float[Tensor, "batch d_transcoder"] | Float[Tensor, " n_places"]
    """All of them, or where `places` is given those at the places."""

    places: Support | None
    """Where activations exist at all (topk on its sparse path)."""

    fired: Int[Tensor, " d_transcoder"]
    """Tokens at which each feature fires."""

    def dense(self) -> Float[Tensor, "batch d_transcoder"]:
        """All activations, without gradients."""
        acts = self.acts.detach()
        return acts if self.places is None else self.places.to_dense(acts)


class CLTStep(NamedTuple):
    """What a forward pass gives."""

    recons: Float[Tensor, "batch n_layers d_model"]
    """Of the scaled outputs."""

    losses: dict[str, Float[Tensor, ""]]
    """Terms of the loss, coefficients included."""

    features: list[LayerFeatures]
    """One a layer."""

    hidden_pre: list[Float[Tensor, "batch d_transcoder"]]
    """One a layer, before phi."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The sum of the terms."""
        return torch.stack(list(self.losses.values())).sum()

    @property
    def fired(self) -> Int[Tensor, " d_sae"]:
        """Tokens at which each feature of all layers fires."""
        return torch.cat([f.fired for f in self.features])


class Workspace:
    """Tensors that are used again at every step.

    Without it a step's activations are freed at its end: the system takes them back and hands them out again page by
    page, which costs a tenth of a step on the CPU. With it, a step's `features` and `hidden_pre` hold until the next
    step with the same workspace; a backward pass after that raises torch's error about changed values.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def take(self, name: str, layer: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """The tensor of that name and layer, its values whatever they were."""
        held = self._tensors.get((name, layer))
        if held is None or held.shape != shape or held.dtype != like.dtype or held.device != like.device:
            held = self._tensors[(name, layer)] = like.new_empty(shape)
        return held.detach()


def clt_step(
    clt: TrainingCLT,
    inputs: Float[Tensor, "batch n_layers d_model"],
    outputs: Float[Tensor, "batch n_layers d_model"],
    coefficients: dict[str, float],
    workspace: Workspace,
) -> CLTStep:
    """The forward pass of a step on scaled activations.

    On a grid of processes the reconstruction and the losses are of all ranks' features, at the tokens of this rank.
    """
    grid = clt.grid
    thresholded = clt.cfg.activation in ("relu", "jumprelu")
    thresholds = [t.to(inputs.dtype) for t in clt.thresholds()]
    layers: list[_Layer] = []
    for layer, x in enumerate(inputs.unbind(dim=1)):
        # A layer is done before the next one begins, so that backward too has one layer's gradients at a time.
        if thresholded:
            layers.append(_thresholded(clt, layer, x, thresholds[layer], coefficients, workspace))
        else:
            layers.append(_chosen(clt, layer, x, workspace))
    recons = sum_by_target(clt.b_dec, [one.written for one in layers], grid)
    losses = {"mse_loss": mse_loss(recons, outputs)}
    if thresholded:
        sums = grid.sum_over_features(torch.stack([one.sums for one in layers]).sum(dim=0))
        sparsity, dead_features = (sums / len(inputs)).unbind()
        losses["sparsity_loss"] = coefficients["sparsity"] * sparsity
        if coefficients["dead_feature"] > 0:
            losses["dead_feature_loss"] = coefficients["dead_feature"] * dead_features
    return CLTStep(recons, losses, [one.features for one in layers], [one.hidden_pre for one in layers])


class _Layer(NamedTuple):
    features: LayerFeatures
    hidden_pre: Tensor
    written: Tensor
    sums: Tensor


def _thresholded(
    clt: TrainingCLT, layer: int, x: Tensor, threshold: Tensor, coefficients: dict[str, float], workspace: Workspace
) -> _Layer:
    """ReLU and JumpReLU, with the sums of the sparsity and dead-feature losses."""
    options = TermOptions(
        activation=clt.cfg.activation,
        bandwidth=clt.cfg.jumprelu_bandwidth,
        straight_through=clt.cfg.straight_through,
        tanh_scale=clt.cfg.tanh_scale,
        dead_features=coefficients["dead_feature"] > 0,
    )
    W_dec, shape = clt.W_dec[layer], (len(x), clt.n_own_features)
    h = encode(x, clt.W_enc[layer], clt.b_enc[layer], workspace.take("hidden_pre", layer, shape, x))
    result = terms(h, threshold, row_norms(W_dec), options, workspace.take("feature_acts", layer, shape, x))
    acts = result.feature_acts
    sparse = float(result.fired.sum()) / acts.numel() < _sparse_below(acts.device)
    written = decode(acts, W_dec, support_of_dense(acts.detach()) if sparse else None, clt.cfg.d_in)
    features = LayerFeatures(acts, None, result.fired)
    return _Layer(features, h.detach(), written, torch.stack([result.sparsity, result.dead_features]))


def _chosen(clt: TrainingCLT, layer: int, x: Tensor, workspace: Workspace) -> _Layer:
    """TopK: on the sparse path, no gradient of any pre-activation but the chosen ones is ever made."""
    k, n_features, W_enc, b_enc = clt.cfg.k, clt.n_own_features, clt.W_enc[layer], clt.b_enc[layer]
    sparse = k / clt.cfg.d_transcoder < _sparse_below(x.device)
    with torch.set_grad_enabled(not sparse and torch.is_grad_enabled()):
        h = encode(x, W_enc, b_enc, workspace.take("hidden_pre", layer, (len(x), n_features), x))
    places = topk_places(h.detach(), k, clt.grid)
    values = torch.relu(pick(h, x, W_enc, b_enc, places) if sparse else places.gather(h))
    fired = torch.bincount(places.features[values > 0], minlength=n_features)
    if sparse:
        features = LayerFeatures(values, places, fired)
        written = decode_places(values, clt.W_dec[layer], places, clt.cfg.d_in)
    else:
        features = LayerFeatures(places.to_dense(values), None, fired)
        written = decode(features.acts, clt.W_dec[layer])
    return _Layer(features, h.detach(), written, x.new_zeros(2))


def _sparse_below(device: torch.device) -> float:
    return SPARSE_BELOW.get(device.type, SPARSE_BELOW_ELSEWHERE)
