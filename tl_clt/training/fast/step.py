"""One training step's forward pass: what `clt.define_step` defines, at the speed that training needs.

Which products run over active features only is chosen by their measured density; the results are the same.
A layer is done before the next one begins, where selection allows it, so that backward too has one layer's gradients
at a time.

phi and the loss terms that are sums over features, taken by autograd, keep half a dozen tensors [batch, d_transcoder]
for the backward pass, and each of their two dozen operations reads and writes main memory. Here a block of tokens,
small enough for the cache, goes through all of them, with derivatives by hand: a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
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
    GROUP,
    Support,
    apply_far_decoders,
    attach_gradients,
    decode,
    decode_places,
    decode_rows,
    encode,
    encode_places,
    encode_rows,
    far_norms,
    row_norms,
    sum_by_target,
    support_above,
    support_of_topk,
)
from tl_clt.training.losses import (
    SparsityKind,
    StraightThrough,
    auxk_loss,
    mse_loss,
    sparsity_loss,
)
from tl_clt.training.parallel import SINGLE, ProcessGrid

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
        smallest, auxk = None, auxk_of(clt, step_input)
        if clt.cfg.selects:
            layers, smallest = _selected_layers(clt, xs, step_input.n_training_steps, auxk, self)
        else:
            layers = _thresholded_layers(clt, xs, step_input.coefficients, auxk, self)
        shape = (clt.cfg.n_layers, clt.cfg.d_in)
        recons = sum_by_target([one.written for one in layers], shape, clt.grid) + clt.b_dec
        if clt.W_skip is not None:
            recons = recons + torch.stack([decode(x, W_skip) for x, W_skip in zip(xs, clt.W_skip, strict=True)], dim=1)
        losses = {"mse_loss": mse_loss(recons, outputs)}
        if auxk is not None:
            by_dead = [one.by_dead for one in layers if one.by_dead is not None]
            e_hat = sum_by_target(by_dead, shape, clt.grid)
            losses["auxk_loss"] = auxk.coefficient * auxk_loss(
                outputs - recons.detach(), e_hat, auxk.n_dead, auxk.k_aux
            )
        if not clt.cfg.selects:
            losses |= _penalties(clt, layers, step_input.coefficients)
        if (far_write := step_input.coefficients.get("far_write", 0.0)) > 0:
            far = torch.stack([one.far_write(clt.far_weights(s, clt.sum_dtype)) for s, one in enumerate(layers)]).sum()
            losses["far_write_loss"] = far_write * clt.grid.sum_over_features(far) / len(recons)
        return CLTStep(recons, losses, [one.features for one in layers], [one.hidden_pre for one in layers], smallest)

    def take(self, name: str, layer: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """The tensor kept under that name and layer, to be written over: its values are those of an earlier step."""
        tensor = self._tensors.get((name, layer))
        if tensor is None or tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
            tensor = self._tensors[(name, layer)] = like.new_empty(shape)
        return tensor.detach()


class _Layer(NamedTuple):
    features: LayerFeatures
    hidden_pre: Tensor
    written: Tensor
    far_write: Callable[[Tensor], Tensor]
    """From weights of the features to the sum over tokens and features of activation times weight."""
    by_dead: Tensor | None
    """What AuxK's chosen features write, where it has a part in the step. It is made before `written`: `backward()`
    comes to it afterwards, and adds its few rows to gradients that are there."""
    counts: Tensor | None = None
    dead_features: Tensor | None = None


def _thresholded_layers(
    clt: TrainingCLT, xs: tuple[Tensor, ...], coefficients: dict[str, float], auxk: AuxK | None, memory: FastStep
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
        by_dead = None if auxk is None else auxk.written(clt, layer, x, h.detach())
        out = memory.take("feature_acts", layer, shape, x)
        result = terms_in_blocks(h, threshold.to(x.dtype), _norms(clt, layer), options, out)
        acts = result.feature_acts
        sparse = float(result.fired.sum()) / acts.numel() < _sparse_below(acts.device)
        places = support_above(acts.detach(), acts.new_zeros(1, 1)) if sparse else None
        written = decode(acts, clt.W_dec[layer], places)
        features = LayerFeatures(acts.detach, result.fired)
        written = _to_targets(clt, layer, written)
        far_write = partial(torch.dot, acts.sum(dim=0))
        layers.append(_Layer(features, h.detach(), written, far_write, by_dead, result.counts, result.dead_features))
    return layers


def _selected_layers(
    clt: TrainingCLT, xs: tuple[Tensor, ...], n_training_steps: int, auxk: AuxK | None, memory: FastStep
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
            selected = select(clt, group, scores, k)
        smallest += selected.smallest
        for s, h, places in zip(group, hidden_pre, selected.places, strict=True):
            by_dead = None if auxk is None else auxk.written(clt, s, xs[s], h)
            layers.append(_kept(clt, s, xs[s], h, places, by_dead))
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


def _kept(
    clt: TrainingCLT, layer: int, x: Tensor, hidden_pre: Tensor, places: Support, by_dead: Tensor | None
) -> _Layer:
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
        written = decode_places(values, clt.W_dec[layer], places)
    else:
        acts = places.to_dense(values)
        features = LayerFeatures(acts.detach, fired)
        written = decode(acts, clt.W_dec[layer])
    far_write = partial(_weighted, values, places.features)
    return _Layer(features, hidden_pre, _to_targets(clt, layer, written), far_write, by_dead)


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


def _norms(clt: TrainingCLT, layer: int) -> Tensor:
    far = clt.far(layer)
    return row_norms(clt.W_dec[layer]) if far is None else far_norms(clt.W_dec[layer], far)


def _to_targets(clt: TrainingCLT, layer: int, written: Tensor) -> Tensor:
    far = clt.far(layer)
    return written if far is None else apply_far_decoders(written, far)


def _sparse_below(device: torch.device) -> float:
    return SPARSE_BELOW.get(device.type, SPARSE_BELOW_ELSEWHERE)


# -- which features TopK and BatchTopK keep: see `clt.smallest_kept_scores`, on a grid of processes and without sorting.
# Features compete with those of all ranks of a grid, and the batch is that of all ranks. Each rank offers what might be
# kept, every rank sees all offers, and so all agree.

Scores = Float[Tensor, "batch d_transcoder"]

CANDIDATES_ABOVE = (0.9, 0.6, 0.0)
"""Shares of the running threshold above which a batch's smallest kept score is looked for, one after another until
there are enough candidates."""


class Selected(NamedTuple):
    """What is kept of some layers."""

    places: list[Support]
    """Where, in each layer, of this rank's tokens and features."""

    smallest: list[Float[Tensor, ""]]
    """The smallest score kept in each layer, of all ranks' features; mean over this rank's tokens."""


class LayerTopK(NamedTuple):
    """What topk keeps of one layer."""

    places: Support
    """Where, of this rank's features."""

    smallest: Float[Tensor, " batch"]
    """The smallest score kept at each token, of all ranks' features."""


def layer_topk(scores: Scores, k: int, grid: ProcessGrid) -> LayerTopK:
    """Exactly the k largest of each token in one layer, of all ranks' features."""
    offers = largest(scores, min(k, scores.shape[1]))
    if grid.n_feature_shards == 1:
        return LayerTopK(support_of_topk(offers.indices, scores.shape[1]), offers.values.amin(dim=1))
    kept = largest_offers(offers.values, k, grid)
    offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
    smallest = torch.where(kept, offers.values, torch.inf).amin(dim=1)
    places = Support(offers.indices[kept], offsets, scores.shape[1])
    return LayerTopK(places, grid.all_features(smallest[:, None], dim=1).amin(dim=1))


class Largest(NamedTuple):
    """As `torch.topk` gives it, in any order."""

    values: Float[Tensor, "batch k"]
    """The largest scores of each token."""

    indices: Int[Tensor, "batch k"]
    """Of which features."""


def largest(scores: Scores, k: int) -> Largest:
    """The k largest scores of each token.

    On the CPU, torch.topk takes longer than the product that made the scores. The k largest scores are in the k groups
    whose largest score is largest: it chooses groups first, and then among their members only.
    """
    n_tokens, n_features = scores.shape
    n_groups = n_features // GROUP
    if scores.device.type != "cpu":
        return Largest(*torch.topk(scores, k, dim=1, sorted=False))
    if n_groups * GROUP != n_features or n_groups < k:
        return _largest_on_cpu(scores, k)
    grouped = scores.view(n_tokens, GROUP, n_groups)
    groups = _largest_on_cpu(grouped.amax(dim=1), k).indices
    members = grouped.gather(2, groups[:, None, :].expand(-1, GROUP, -1)).flatten(start_dim=1)
    values, places = _largest_on_cpu(members, k)
    return Largest(values, places // k * n_groups + groups.gather(1, places % k))


def _largest_on_cpu(scores: Scores, k: int) -> Largest:
    """By numpy's partition, which takes a third of the time of torch.topk. What is no number is largest in both."""
    n_others = scores.shape[1] - k
    if n_others == 0:
        return Largest(scores, torch.arange(k).expand(len(scores), k))
    indices = torch.from_numpy(np.argpartition(scores.detach().numpy(), n_others, axis=1)[:, n_others:])
    return Largest(scores.gather(1, indices), indices)


def largest_offers(
    offers: Float[Tensor, "batch n_offers"], k: int, grid: ProcessGrid
) -> Bool[Tensor, "batch n_offers"]:
    """Which of this rank's offers are among the k largest of all ranks': of equal ones, those of lower ranks first.

    Args:
        offers: of as many on every rank; -inf where it has fewer.
        k: at most as many as are not -inf.
        grid: the ranks.
    """
    everyones, n = grid.all_features(offers, dim=1), offers.shape[1]
    first = torch.sort(everyones, dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(everyones, dtype=torch.bool).scatter_(1, first, True)
    return kept[:, grid.feature_index * n : (grid.feature_index + 1) * n]


def token_thresholds(scores: Sequence[Scores], n_kept: int, grid: ProcessGrid = SINGLE) -> Float[Tensor, "batch 1"]:
    """Each token's `n_kept`-th largest score, over the features of all the layers given."""
    offers = [largest(s, min(n_kept, s.shape[1])).values for s in scores]
    together = grid.all_features(torch.cat(offers, dim=1), dim=1)
    return largest(together, n_kept).values.amin(dim=1, keepdim=True)


def batch_topk(scores: Sequence[Scores], n_kept: int, guess: float, grid: ProcessGrid = SINGLE) -> Selected:
    """The `n_kept` largest scores of a batch, where they are positive, over the features of all the layers given.

    Args:
        scores: one tensor a layer, of this rank's tokens and features.
        n_kept: how many to keep, of all ranks' together.
        guess: about what the smallest will be, or 0: it saves looking at what is far below, and changes nothing else.
        grid: the ranks.
    """
    for share in CANDIDATES_ABOVE:
        places = [support_above(s, s.new_full((1, 1), share * guess)) for s in scores]
        scores_here = [support.gather(s) for support, s in zip(places, scores, strict=True)]
        candidates = grid.all_of_any_length(torch.cat(scores_here))
        if len(candidates) >= n_kept:
            smallest = torch.kthvalue(candidates, len(candidates) - n_kept + 1).values
            kept = [support.only(~(values < smallest)) for support, values in zip(places, scores_here, strict=True)]
            return Selected(kept, [smallest] * len(scores))
    return Selected(places, [candidates.new_zeros(())] * len(scores))


def select(clt: TrainingCLT, layers: range, scores: Sequence[Scores], k: int) -> Selected:
    """What is kept of layers that compete: in training within the batch, otherwise as at inference.

    Args:
        clt: on a grid, one rank's share of it.
        layers: all of them, or one by itself.
        scores: of each.
        k: features per layer and token.
    """
    cfg, grid = clt.cfg, clt.grid
    if cfg.has_score_threshold and not clt.selects_in_batch:
        smallest = [clt.score_threshold[s] for s in layers]
        lows = [t.clamp(min=0.0).view(1, 1) for t in smallest]
        return Selected([support_above(s, low) for s, low in zip(scores, lows, strict=True)], smallest)
    if cfg.activation == "batchtopk":
        n_kept = k * len(layers) * len(scores[0]) * grid.n_data_parallel
        return batch_topk(scores, n_kept, float(clt.score_threshold[layers[0]]), grid)
    if cfg.topk_across == "layer":
        best = layer_topk(scores[0], k, grid)
        return Selected([best.places], [best.smallest.mean()])
    of_token = token_thresholds(scores, k * len(layers), grid)
    below = torch.nextafter(of_token, of_token.new_tensor(-torch.inf)).clamp(min=0.0)
    return Selected([support_above(s, below) for s in scores], [of_token.mean()] * len(layers))


# -- phi and the terms that are sums over features

BLOCK_ELEMENTS = {"cpu": 2**16}
"""Pre-activations of a block for each thread: 256 KiB in float32, so that the second-level cache of a core holds a
block of all that is made of them."""
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


class Terms(NamedTuple):
    """One layer's activations, and its sums over features."""

    feature_acts: Float[Tensor, "batch d_transcoder"]
    """After phi."""

    counts: Float[Tensor, " batch"]
    """What the features count for in the sparsity loss, summed over the layer, at each token."""

    dead_features: Float[Tensor, ""]
    """The dead-feature loss, summed over tokens."""

    fired: Int[Tensor, " d_transcoder"]
    """Tokens at which each feature fires."""


def terms_in_blocks(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    norms: Float[Tensor, " d_transcoder"],
    options: TermOptions,
    out: Float[Tensor, "batch d_transcoder"],
) -> Terms:
    """phi, and the terms that are sums over features, with their gradients. Activations are written into `out`."""
    return Terms(*_Terms.apply(hidden_pre, threshold, norms, options, out))


class _Terms(torch.autograd.Function):
    """The formulas of `jumprelu`, `tanh_count`, `step_function` and `dead_feature_loss`, and their derivatives.

    relu is jumprelu with a threshold of 0 that learns nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_pre: Tensor, threshold: Tensor, norms: Tensor, options: TermOptions, acts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden_pre, threshold, norms, acts)
        ctx.mark_dirty(acts)
        ctx.options = options
        counts, dead_features = hidden_pre.new_empty(len(hidden_pre)), hidden_pre.new_zeros(())
        fired = torch.zeros(hidden_pre.shape[1], dtype=torch.long, device=hidden_pre.device)
        doubled = 2 * options.tanh_scale * norms
        for rows, (spare,) in _blocks(hidden_pre, 1):
            h, a = hidden_pre[rows], acts[rows]
            fires = torch.gt(h, threshold, out=spare)
            torch.mul(h, fires, out=a)
            fired += fires.sum(dim=0).long()
            if options.sparsity == "tanh":
                counts[rows] = 2 * torch.mul(a, doubled, out=spare).sigmoid_().sub_(0.5).sum(dim=1)
            else:
                counts[rows] = fires.sum(dim=1)
            if options.dead_features:
                dead_features += torch.sub(threshold, h, out=spare).relu_().sum(dim=0) @ norms
        ctx.mark_non_differentiable(fired)
        return acts, counts, dead_features, fired

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, for_acts: Tensor, for_counts: Tensor, for_dead: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_pre, threshold, norms, acts = ctx.saved_tensors
        options: TermOptions = ctx.options
        jumps, tanh, all_of_it = (
            options.activation == "jumprelu",
            options.sparsity == "tanh",
            options.straight_through == "all",
        )
        eps, half, twice = options.bandwidth, options.bandwidth / 2, 2 * options.tanh_scale
        doubled, slope_in_window = twice * norms, (threshold + half) / eps
        for_hidden_pre = torch.empty_like(hidden_pre)
        for_threshold, for_norms = torch.zeros_like(threshold), torch.zeros_like(norms)
        for rows, (distance, window, spare, other) in _blocks(hidden_pre, 4):
            a, grad, of_counts = acts[rows], for_hidden_pre[rows], for_counts[rows, None]
            torch.sub(hidden_pre[rows], threshold, out=distance)
            if jumps or not tanh:
                torch.lt(torch.abs(distance, out=window), half, out=window)
            if tanh:
                # d tanh(z) / dz = 4 s (1 - s), with s = sigmoid(2 z)
                s = torch.mul(a, doubled, out=spare).sigmoid_()
                slope = torch.addcmul(s, s, s, value=-1, out=other).mul_(2 * twice * of_counts)
                torch.addcmul(for_acts[rows], slope, norms, out=grad)
                for_norms += slope.mul_(a).sum(dim=0)
            else:
                grad.copy_(for_acts[rows])
            if jumps:
                in_window = torch.mul(grad, window, out=spare)
                for_threshold -= in_window.sum(dim=0) * (threshold / eps)
            if jumps and all_of_it:
                grad.mul_(torch.ge(distance, half, out=other)).addcmul_(spare, slope_in_window)
            else:
                grad.mul_(torch.gt(distance, 0.0, out=other))
            if not tanh:
                of_window = window.mul_(of_counts / eps)
                for_threshold -= of_window.sum(dim=0)
                if all_of_it:
                    grad += of_window
            if options.dead_features:
                for_norms += for_dead * torch.neg(distance, out=spare).relu_().sum(dim=0)
                below = torch.lt(distance, 0.0, out=spare)
                for_threshold += for_dead * norms * below.sum(dim=0)
                grad.addcmul_(below, for_dead * norms, value=-1)
        return for_hidden_pre, for_threshold, for_norms, None, None


def _blocks(hidden_pre: Tensor, n_spare: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of tokens, each with tensors of its shape to write into."""
    elements = BLOCK_ELEMENTS_ELSEWHERE
    if hidden_pre.device.type in BLOCK_ELEMENTS:
        elements = torch.get_num_threads() * BLOCK_ELEMENTS[hidden_pre.device.type]
    n = min(len(hidden_pre), max(1, elements // hidden_pre.shape[1]))
    spare = [hidden_pre.new_empty(n, hidden_pre.shape[1]) for _ in range(n_spare)]
    for start in range(0, len(hidden_pre), n):
        rows = slice(start, min(start + n, len(hidden_pre)))
        yield rows, [one[: rows.stop - start] for one in spare]


# -- AuxK: see `losses`


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """AuxK's part in a step at which features are dead."""

    coefficient: float
    """Weight of the term."""

    k_aux: int
    """Dead features of each layer to choose at a token, of all ranks' features."""

    n_dead: int
    """Dead features of all layers, on whatever rank."""

    dead: Sequence[Bool[Tensor, " all_features"]]
    """Which they are, of each layer."""

    def written(
        self,
        clt: TrainingCLT,
        layer: int,
        x: Float[Tensor, "batch d_model"],
        hidden_pre: Float[Tensor, "batch d_transcoder"],
    ) -> Float[Tensor, "batch width"]:
        """What one layer's chosen dead features write with their pre-activations, to all the layer's targets.

        Where few of them are chosen, products run over the chosen ones alone, and else over all the dead, with zeros
        for the others.

        Args:
            clt: on a grid, one rank's share of it.
            layer: which.
            x: its scaled input.
            hidden_pre: of this rank's features, without gradients.
        """
        if not self.dead[layer].any():
            return x.new_zeros(len(x), len(clt.targets[layer]) * clt.cfg.d_in)
        W_enc, b_enc, W_dec = clt.W_enc[layer], clt.b_enc[layer], clt.W_dec[layer]
        numbers = self.dead[layer][clt.grid.own(clt.cfg.d_transcoder)].nonzero().flatten()
        chosen = self._choose(clt.grid, layer, hidden_pre.index_select(1, numbers))
        if chosen is not None and chosen.sum() < _sparse_below(x.device) * chosen.numel():
            tokens, places = chosen.nonzero(as_tuple=True)
            offsets = F.pad(torch.bincount(tokens, minlength=len(x)).cumsum(dim=0), (1, 0))
            support = Support(numbers[places], offsets, clt.n_own_features)
            values = encode_places(hidden_pre, x, W_enc, b_enc, support)
            return _to_targets(clt, layer, decode_places(values, W_dec, support))
        acts = encode_rows(hidden_pre, x, W_enc, b_enc, numbers)
        if chosen is not None:
            acts = acts * chosen.to(acts.dtype)
        return _to_targets(clt, layer, decode_rows(acts, W_dec, numbers))

    def _choose(
        self, grid: ProcessGrid, layer: int, hidden_pre: Float[Tensor, "batch n_dead"]
    ) -> Bool[Tensor, "batch n_dead"] | None:
        """Which of this rank's dead features are among the `k_aux` of the largest hidden_pre; None where all are."""
        n_own, n_all = hidden_pre.shape[1], int(self.dead[layer].sum())
        if n_all <= self.k_aux:
            return None
        offers = largest(hidden_pre, min(self.k_aux, n_own))
        if grid.n_feature_shards > 1:
            # Every rank offers as many as the one with the most has.
            most = min(self.k_aux, int(self.dead[layer].unflatten(0, (grid.n_feature_shards, -1)).sum(dim=1).max()))
            n_offers = offers.values.shape[1]
            padded = F.pad(offers.values, (0, most - n_offers), value=-torch.inf)
            kept = largest_offers(padded, self.k_aux, grid)[:, :n_offers]
        else:
            kept = torch.ones_like(offers.indices, dtype=torch.bool)
        return torch.zeros_like(hidden_pre, dtype=torch.bool).scatter_(1, offers.indices, kept)


def auxk_of(clt: TrainingCLT, step_input: TrainStepInput) -> AuxK | None:
    """None where no feature is dead, or the term has no weight."""
    coefficient, dead = step_input.coefficients.get("auxk", 0.0), step_input.dead_neuron_mask
    n_dead = 0 if dead is None or coefficient == 0 else int(dead.sum())
    if dead is None or n_dead == 0:
        return None
    by_layer = dead.unflatten(0, (clt.cfg.n_layers, -1)).unbind(dim=0)
    return AuxK(coefficient=coefficient, k_aux=clt.cfg.k_aux or clt.cfg.d_in // 2, n_dead=n_dead, dead=by_layer)
