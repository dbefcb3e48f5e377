"""One training step's forward pass: what `clt.define_step` defines, at the speed that training needs.

Which products run over active features only is chosen by their measured density; the results are the same.
A layer is done before the next one begins, where selection allows it, so that backward too has one layer's gradients
at a time.

phi and the loss terms that are sums over features, taken at once, keep half a dozen tensors [batch, d_transcoder] for
the backward pass. Here a block of tokens goes through the plain formulas (`plain_terms`), which stays in the cache;
backward goes through them again, with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tl_clt.errors import ConfigError
from tl_clt.training.clt import CLTStep, LayerFeatures, TrainingCLT
from tl_clt.training.fast.products import (
    Support,
    Values,
    apply_far_decoders,
    attach_gradients,
    decode,
    decode_places,
    encode,
    encode_places,
    far_norms,
    row_norms,
    sum_by_target,
    support_of_dense,
    support_of_topk,
)
from tl_clt.training.fast.selection import largest_offers, layer_topk, smallest_kept
from tl_clt.training.losses import (
    SparsityKind,
    StraightThrough,
    auxk_loss,
    dead_feature_loss,
    jumprelu,
    mse_loss,
    sparsity_loss,
    step_function,
    tanh_count,
)

SPARSE_BELOW = {"cpu": 0.1}
"""Share of active features below which sparse products are faster, by kind of device. Measured on two cores with
AVX-512: at 10% they take half the time of dense ones, at 20% as much."""
SPARSE_BELOW_ELSEWHERE = 0.01


class FastStep:
    """`define_step`, up to the order of addition, at the speed that training needs: of one training run.

    It keeps tensors that are used again at every step. Without them a step's activations are freed at its end: the
    system takes them back and hands them out again page by page, which costs a tenth of a step on the CPU. With them, a
    step's `features` and `hidden_pre` hold until the next step; a backward pass after that raises torch's error about
    changed values.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def __call__(self, clt: TrainingCLT, step_input: TrainStepInput) -> CLTStep:
        """The forward pass and the losses of a step on scaled activations [batch, 2, n_layers, d_model].

        On a grid of processes the reconstruction and the losses are of all ranks' features, at the tokens of this rank.

        Raises:
            ConfigError: it is called within DistributedDataParallel, which would not see its gradients.
        """
        if DistributedDataParallel._get_active_ddp_module() is not None:
            raise ConfigError(
                "FastStep adds to gradients in place, where DistributedDataParallel does not see them: train with"
                " CLTTrainingRunner and set n_data_parallel, or call the CLT's training_forward_pass."
            )
        inputs, outputs = step_input.sae_in.to(clt.sum_dtype).unbind(dim=1)
        xs = inputs.unbind(dim=1)
        smallest = None
        if clt.cfg.selects:
            layers, smallest = _selected_layers(clt, xs, step_input.n_training_steps, self)
        else:
            layers = _thresholded_layers(clt, xs, step_input.coefficients, self)
        recons = sum_by_target(clt.b_dec, [one.written for one in layers], clt.grid)
        if clt.W_skip is not None:
            recons = recons + torch.stack([decode(x, W_skip) for x, W_skip in zip(xs, clt.W_skip, strict=True)], dim=1)
        losses = {"mse_loss": mse_loss(recons, outputs)}
        hidden_pre = [one.hidden_pre for one in layers]
        losses |= _auxk(clt, xs, hidden_pre, (outputs - recons).detach(), step_input)
        if not clt.cfg.selects:
            losses |= _penalties(clt, layers, step_input.coefficients)
        if (far_write := step_input.coefficients.get("far_write", 0.0)) > 0:
            far = torch.stack([one.far_write(clt.far_weights(s, clt.sum_dtype)) for s, one in enumerate(layers)]).sum()
            losses["far_write_loss"] = far_write * clt.grid.sum_over_features(far) / len(recons)
        return CLTStep(recons, losses, [one.features for one in layers], hidden_pre, smallest)

    def take(self, name: str, layer: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """The tensor of that name and layer, its values whatever they were."""
        held = self._tensors.get((name, layer))
        if held is None or held.shape != shape or held.dtype != like.dtype or held.device != like.device:
            held = self._tensors[(name, layer)] = like.new_empty(shape)
        return held.detach()


class _Layer(NamedTuple):
    features: LayerFeatures
    hidden_pre: Tensor
    written: Tensor
    far_write: Callable[[Tensor], Tensor]
    """From weights of the features to the sum over tokens and features of activation times weight."""
    counts: Tensor | None = None
    dead_features: Tensor | None = None


def _thresholded_layers(
    clt: TrainingCLT, xs: tuple[Tensor, ...], coefficients: dict[str, float], memory: FastStep
) -> list[_Layer]:
    """ReLU and JumpReLU, with the sums of the sparsity and dead-feature losses."""
    options = TermOptions(
        activation=clt.cfg.activation,
        bandwidth=clt.cfg.jumprelu_bandwidth,
        straight_through=clt.cfg.straight_through,
        sparsity=clt.cfg.sparsity_loss,
        tanh_scale=clt.cfg.tanh_scale,
        dead_features=coefficients["dead_feature"] > 0,
    )
    layers: list[_Layer] = []
    for layer, (x, threshold) in enumerate(zip(xs, clt.thresholds(), strict=True)):
        shape = (len(x), clt.n_own_features)
        h = encode(x, clt.W_enc[layer], clt.b_enc[layer], memory.take("hidden_pre", layer, shape, x))
        out = memory.take("feature_acts", layer, shape, x)
        result = terms_in_blocks(h, threshold.to(x.dtype), _norms(clt, layer), options, out)
        acts = result.feature_acts
        sparse = float(result.fired.sum()) / acts.numel() < _sparse_below(acts.device)
        written = decode(acts, clt.W_dec[layer], support_of_dense(acts.detach()) if sparse else None, clt.cfg.d_in)
        features = LayerFeatures(acts.detach, result.fired)
        written = _to_targets(clt, layer, written)
        far_write = partial(torch.dot, acts.sum(dim=0))
        layers.append(_Layer(features, h.detach(), written, far_write, result.counts, result.dead_features))
    return layers


def _selected_layers(
    clt: TrainingCLT, xs: tuple[Tensor, ...], n_training_steps: int, memory: FastStep
) -> tuple[list[_Layer], Tensor]:
    """TopK and BatchTopK, and the smallest scores kept."""
    cfg = clt.cfg
    k = cfg.k_at(n_training_steps)
    assert k is not None
    layers: list[_Layer] = []
    smallest: list[Tensor] = []
    together = cfg.topk_across == "all_layers"
    for group in [range(cfg.n_layers)] if together else [range(s, s + 1) for s in range(cfg.n_layers)]:
        with torch.no_grad():
            hidden_pre = [_encoded(clt, s, xs[s], memory) for s in group]
            scores = [_scored(clt, s, h, memory) for s, h in zip(group, hidden_pre, strict=True)]
            places, thresholds = _places(clt, group, scores, k)
        smallest += thresholds
        for s, h, where in zip(group, hidden_pre, places, strict=True):
            layers.append(_kept(clt, s, xs[s], h, where))
    of_all_tokens = torch.stack(smallest)
    clt.grid.mean_over_data([of_all_tokens])
    return layers, of_all_tokens


def _encoded(clt: TrainingCLT, layer: int, x: Tensor, memory: FastStep) -> Tensor:
    out = memory.take("hidden_pre", layer, (len(x), clt.n_own_features), x)
    return encode(x, clt.W_enc[layer], clt.b_enc[layer], out)


def _scored(clt: TrainingCLT, layer: int, hidden_pre: Tensor, memory: FastStep) -> Tensor:
    """hidden_pre * ||W_dec,i||. One layer's may take the place of the last one's, unless they compete."""
    slot = layer if clt.cfg.topk_across == "all_layers" else 0
    out = memory.take("scores", slot, (len(hidden_pre), clt.n_own_features), hidden_pre)
    return torch.mul(hidden_pre, _norms(clt, layer).to(hidden_pre.dtype), out=out)


def _places(clt: TrainingCLT, group: range, scores: list[Tensor], k: int) -> tuple[list[Support], list[Tensor]]:
    """Where features are kept, and the smallest score of each layer."""
    if clt.cfg.activation == "topk" and len(group) == 1 and not clt.cfg.has_score_threshold:
        # As `smallest_kept`, without a look at every score again.
        best = layer_topk(scores[0], k, clt.grid)
        return [best.places], [best.smallest.mean()]
    if clt.cfg.has_score_threshold and not clt.selects_in_batch:
        thresholds = [clt.score_threshold[s].view(1, 1) for s in group]
        kept = [s > t for s, t in zip(scores, thresholds, strict=True)]
    else:
        thresholds = smallest_kept(clt, scores, k)
        kept = [s >= t for s, t in zip(scores, thresholds, strict=True)]
    places = [support_of_dense((s * keep).clamp_(min=0.0)) for s, keep in zip(scores, kept, strict=True)]
    return places, [t.mean() for t in thresholds]


def _kept(clt: TrainingCLT, layer: int, x: Tensor, hidden_pre: Tensor, places: Support) -> _Layer:
    """One layer's activations at the places. On the sparse path, no gradient of another pre-activation is made."""
    W_enc, b_enc, n_features = clt.W_enc[layer], clt.b_enc[layer], clt.n_own_features
    sparse = len(places.features) / hidden_pre.numel() < _sparse_below(x.device)
    if sparse:
        values = torch.relu(encode_places(hidden_pre, x, W_enc, b_enc, places))
    else:
        values = torch.relu(places.gather(attach_gradients(hidden_pre, x, W_enc, b_enc)))
    fired = torch.bincount(places.features[values > 0], minlength=n_features)
    if sparse:
        features = LayerFeatures(partial(places.to_dense, values.detach()), fired)
        written = decode_places(values, clt.W_dec[layer], places, clt.cfg.d_in)
    else:
        acts = places.to_dense(values)
        features = LayerFeatures(acts.detach, fired)
        written = decode(acts, clt.W_dec[layer])
    return _Layer(features, hidden_pre, _to_targets(clt, layer, written), partial(_weighted, values, places.features))


def _weighted(values: Tensor, features: Tensor, weights: Tensor) -> Tensor:
    return (values * weights[features]).sum()


def _penalties(clt: TrainingCLT, layers: list[_Layer], coefficients: dict[str, float]) -> dict[str, Tensor]:
    """Sparsity and dead-feature terms."""
    cfg = clt.cfg
    counts = clt.grid.sum_over_features(torch.stack([one.counts for one in layers if one.counts is not None]))
    sparsity = sparsity_loss(counts, cfg.sparsity_loss, clt.sparsity_shares, cfg.target_l0)
    losses = {"sparsity_loss": coefficients["sparsity"] * sparsity}
    if coefficients["dead_feature"] > 0:
        dead = torch.stack([one.dead_features for one in layers if one.dead_features is not None]).sum()
        dead = clt.grid.sum_over_features(dead) / counts.shape[1]
        losses["dead_feature_loss"] = coefficients["dead_feature"] * dead
    return losses


def _auxk(
    clt: TrainingCLT, xs: tuple[Tensor, ...], hidden_pre: list[Tensor], residual: Tensor, step_input: TrainStepInput
) -> dict[str, Tensor]:
    """AuxK's term, where features are dead."""
    coefficient, dead = step_input.coefficients.get("auxk", 0.0), step_input.dead_neuron_mask
    n_dead = 0 if dead is None or coefficient == 0 else int(dead.sum())
    if dead is None or n_dead == 0:
        return {}
    k_aux = clt.cfg.k_aux or clt.cfg.d_in // 2
    written: list[Tensor] = []
    for layer, dead_here in enumerate(dead.unflatten(0, (clt.cfg.n_layers, -1))):
        chosen = auxk_features(clt, layer, xs[layer], hidden_pre[layer], dead_here, k_aux)
        if chosen is None:
            written.append(residual.new_zeros(len(residual), len(clt.targets[layer]) * clt.cfg.d_in))
        else:
            written.append(_to_targets(clt, layer, decode_places(chosen[0], clt.W_dec[layer], chosen[1], clt.cfg.d_in)))
    by_target = sum_by_target(torch.zeros_like(residual[0]), written, clt.grid)
    return {"auxk_loss": coefficient * auxk_loss(residual, by_target, n_dead, k_aux)}


def _norms(clt: TrainingCLT, layer: int) -> Tensor:
    far = clt.far(layer)
    return row_norms(clt.W_dec[layer]) if far is None else far_norms(clt.W_dec[layer], far)


def _to_targets(clt: TrainingCLT, layer: int, written: Tensor) -> Tensor:
    far = clt.far(layer)
    return written if far is None else apply_far_decoders(written, far)


def _sparse_below(device: torch.device) -> float:
    return SPARSE_BELOW.get(device.type, SPARSE_BELOW_ELSEWHERE)


# -- phi and the terms that are sums over features

BLOCK_ELEMENTS = {"cpu": 2**18}
"""Pre-activations of a block: 1 MiB in float32."""
BLOCK_ELEMENTS_ELSEWHERE = 2**26
"""On a GPU launching small blocks costs more than the memory saved."""


@dataclass(frozen=True, kw_only=True)
class TermOptions:
    """Which phi and which terms."""

    activation: Literal["relu", "jumprelu"]
    """phi."""

    bandwidth: float
    """Of the straight-through gradient."""

    straight_through: StraightThrough
    """What it reaches."""

    sparsity: SparsityKind
    """What each feature counts for in the sparsity loss."""

    tanh_scale: float
    """c of "tanh"."""

    dead_features: bool
    """Whether there is a dead-feature loss."""


class PlainTerms(NamedTuple):
    """What the plain formulas give for a block of tokens of one layer."""

    feature_acts: Float[Tensor, "batch d_transcoder"]
    """After phi."""

    counts: Float[Tensor, " batch"]
    """What the features count for in the sparsity loss, summed over the layer, at each token."""

    dead_features: Float[Tensor, ""]
    """The dead-feature loss, summed over tokens."""


class Terms(NamedTuple):
    """The same for a whole batch, with firing counts."""

    feature_acts: Float[Tensor, "batch d_transcoder"]
    """After phi."""

    counts: Float[Tensor, " batch"]
    """What the features count for in the sparsity loss, summed over the layer, at each token."""

    dead_features: Float[Tensor, ""]
    """The dead-feature loss, summed over tokens."""

    fired: Int[Tensor, " d_transcoder"]
    """Tokens at which each feature fires."""


def plain_terms(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    norms: Float[Tensor, " d_transcoder"],
    options: TermOptions,
) -> PlainTerms:
    """The formulas of `activations` and `losses`, for one layer."""
    if options.activation == "jumprelu":
        acts = jumprelu(hidden_pre, threshold, options.bandwidth, options.straight_through)
    else:
        acts = torch.relu(hidden_pre)
    if options.sparsity == "tanh":
        counts = tanh_count(acts, norms, options.tanh_scale)
    else:
        counts = step_function(hidden_pre, threshold, options.bandwidth, options.straight_through).sum(dim=1)
    dead = hidden_pre.new_zeros(())
    if options.dead_features:
        dead = len(hidden_pre) * dead_feature_loss([hidden_pre], [threshold], [norms])
    return PlainTerms(acts, counts, dead)


def terms_in_blocks(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    norms: Float[Tensor, " d_transcoder"],
    options: TermOptions,
    out: Float[Tensor, "batch d_transcoder"],
) -> Terms:
    """`plain_terms` of a whole batch, with its gradients, block by block. Activations are written into `out`."""
    return Terms(*_Terms.apply(hidden_pre, threshold, norms, options, out))


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_pre: Tensor, threshold: Tensor, norms: Tensor, options: TermOptions, acts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden_pre, threshold, norms)
        ctx.mark_dirty(acts)
        ctx.options = options
        counts, dead_features = hidden_pre.new_empty(len(hidden_pre)), hidden_pre.new_zeros(())
        fired = torch.zeros(hidden_pre.shape[1], dtype=torch.long, device=hidden_pre.device)
        for rows in _blocks(hidden_pre):
            block = plain_terms(hidden_pre[rows], threshold, norms, options)
            acts[rows] = block.feature_acts
            counts[rows] = block.counts
            dead_features += block.dead_features
            fired += block.feature_acts.count_nonzero(dim=0)
        ctx.mark_non_differentiable(fired)
        return acts, counts, dead_features, fired

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, for_acts: Tensor, for_counts: Tensor, for_dead: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_pre, threshold, norms = ctx.saved_tensors
        for_hidden_pre = torch.empty_like(hidden_pre)
        for_threshold, for_norms = torch.zeros_like(threshold), torch.zeros_like(norms)
        threshold, norms = threshold.detach().requires_grad_(), norms.detach().requires_grad_()
        for rows in _blocks(hidden_pre):
            with torch.enable_grad():
                h = hidden_pre[rows].detach().requires_grad_()
                block = plain_terms(h, threshold, norms, ctx.options)
            upstream = (for_acts[rows], for_counts[rows], for_dead)
            wanted = [(term, grad) for term, grad in zip(block, upstream, strict=True) if term.requires_grad]
            outputs, upstream = zip(*wanted, strict=True)
            grads = torch.autograd.grad(outputs, (h, threshold, norms), upstream, allow_unused=True)
            for_hidden_pre[rows] = grads[0]
            for total, grad in zip((for_threshold, for_norms), grads[1:], strict=True):
                if grad is not None:
                    total += grad
        return for_hidden_pre, for_threshold, for_norms, None, None


def _blocks(hidden_pre: Tensor) -> list[slice]:
    elements = BLOCK_ELEMENTS.get(hidden_pre.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    n = max(1, elements // hidden_pre.shape[1])
    return [slice(start, start + n) for start in range(0, len(hidden_pre), n)]


# -- AuxK: see `losses`


def auxk_features(
    clt: TrainingCLT,
    layer: int,
    x: Float[Tensor, "batch d_model"],
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    dead: Bool[Tensor, " all_features"],
    k_aux: int,
) -> tuple[Values, Support] | None:
    """One layer's chosen dead features: their pre-activations, with gradients, and places. None where none is dead.

    Args:
        clt: on a grid, one rank's share of it.
        layer: which.
        x: its scaled input.
        hidden_pre: of this rank's features.
        dead: of all features of the layer, on whatever rank.
        k_aux: to choose at a token, of all ranks' features.
    """
    grid, d_transcoder = clt.grid, clt.cfg.d_transcoder
    if not dead.any():
        return None
    numbers = dead[grid.own(d_transcoder)].nonzero().flatten()
    offers = torch.topk(hidden_pre.detach()[:, numbers], min(k_aux, len(numbers)), dim=1, sorted=False)
    if grid.n_feature_shards == 1:
        places = support_of_topk(numbers[offers.indices], d_transcoder)
    else:
        most = int(dead.unflatten(0, (grid.n_feature_shards, -1)).sum(dim=1).max())
        padding = (0, min(k_aux, most) - offers.values.shape[1])
        kept = largest_offers(F.pad(offers.values, padding, value=-torch.inf), min(k_aux, int(dead.sum())), grid)
        kept = kept[:, : offers.values.shape[1]]
        offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
        places = Support(numbers[offers.indices][kept], offsets, clt.n_own_features)
    return encode_places(hidden_pre.detach(), x, clt.W_enc[layer], clt.b_enc[layer], places), places
