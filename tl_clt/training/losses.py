"""The terms of the training loss, and phi with gradients for training.

phi's forward values are those of `tl_clt.transcoder.transcoder`. The terms (Methods, "Building an Interpretable
Replacement Model"): inputs and outputs come scaled so that each layer's median norm is sqrt(d_model) (see
`estimate_scale`). Every term is a sum over layers and features or coordinates and a mean over tokens, so that the MSE
of a CLT that writes nothing is about n_layers * d_model, and `sparsity_coefficient` is what one strongly active
feature costs at one token, in the same units. SAELens's trainer clips the gradient's norm to 1 and uses Adam: the
overall scale of the loss makes no difference, only the ratio of its terms does.

Sparsity has three forms, with n_i(x) what feature i counts for at a token and N_l(x) the sum of n_i(x) over the
features of layer l. lambda rises to `sparsity_coefficient`, and mu_l = 1; with `target_l0` both are what
`L0Controller` makes of them:
    "tanh"          lambda * sum_l mu_l N_l(x),   n_i = tanh(c * ||W_dec,i|| * a_i)                (Methods)
    "l0"            lambda * sum_l mu_l N_l(x),   n_i = 1[h_i > theta_i], straight-through         (Rajamanoharan 2024)
    "quadratic_l0"  lambda * sum_l mu_l (N_l(x) / target_l0 - 1)^2,   n_i as for "l0"              (the same, section 5)

Far writes may be made to cost, so that a layer's result is told from that layer's own features where it can be
(decoders that reach further let a feature do in one hop what the model does in several):
    far_write_loss = sum_i a_i sum_{t > s} (t - s) * ||W_dec,i[s -> t]||,   s the layer of feature i, mean over tokens

AuxK trains features that died to write what the others leave out (Gao et al. 2024, section 2.3):
    auxk_loss = sum over layers ||e - e_hat||^2, mean over tokens,   e = outputs - recons (without gradient)
    e_hat     = what the `k_aux` dead features of each layer with the largest hidden_pre would write, without b_dec
Times min(1, dead features / (n_layers * k_aux)). A chosen feature counts with its pre-activation even where that is
negative, as in SAELens: set to 0, it would leave most dead features without a gradient at most tokens. Without dead
features nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TrainedActivation = Literal["relu", "jumprelu", "topk", "batchtopk"]
StraightThrough = Literal["all", "threshold"]
Across = Literal["layer", "all_layers"]


class _JumpReLU(torch.autograd.Function):
    """Forward: x where x > threshold, else 0. Backward: see `jumprelu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float, through_input: bool) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.through_input = bandwidth, through_input
        return x * _ones_where(torch.gt, x, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, threshold = ctx.saved_tensors
        half, bandwidth = ctx.bandwidth / 2, ctx.bandwidth
        distance = x - threshold
        window = _ones_where(torch.lt, distance.abs(), half)
        grad_threshold = (grad * window).sum(dim=0) * (-threshold / bandwidth)
        if ctx.through_input:
            slope = window.mul_((threshold + half) / bandwidth).add_(_ones_where(torch.ge, distance, half))
        else:
            slope = _ones_where(torch.gt, distance, 0.0)
        return slope.mul_(grad).to(x.dtype), grad_threshold.to(threshold.dtype), None, None


def _ones_where(compare: Callable[..., Tensor], x: Tensor, other: Tensor | float) -> Tensor:
    """1 where the comparison holds, else 0, in x's dtype: a product with a bool tensor takes 20 times as long."""
    return compare(x, other, out=torch.empty_like(x))


def jumprelu(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    bandwidth: float,
    straight_through: StraightThrough,
) -> Float[Tensor, "batch d_transcoder"]:
    """`x * 1[x > theta]`, with straight-through gradients over a rectangular window of width `bandwidth` = eps.

        d/dtheta = -(theta / eps) * 1[|x - theta| < eps/2]                                     both modes
        d/dx     = 1[x > theta]                                                                "threshold"
        d/dx     = 1[x - theta >= eps/2] + 1[|x - theta| < eps/2] * (theta + eps/2) / eps      "all"

    "all" is the slope of the line that rises from 0 at the window's lower end to the true value at its upper
    end, so that features just below their threshold learn as well (Methods, "Building an Interpretable
    Replacement Model").
    """
    return _JumpReLU.apply(hidden_pre, threshold, bandwidth, straight_through == "all")  # type: ignore[no-any-return]


class _Step(torch.autograd.Function):
    """Forward: 1 where x > threshold, else 0. Backward: see `step_function`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float, through_input: bool) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.through_input = bandwidth, through_input
        return _ones_where(torch.gt, x, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, threshold = ctx.saved_tensors
        slope = _ones_where(torch.lt, (x - threshold).abs(), ctx.bandwidth / 2).mul_(grad / ctx.bandwidth)
        for_x = slope.to(x.dtype) if ctx.through_input else None
        return for_x, -slope.sum(dim=0).to(threshold.dtype), None, None


def step_function(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    bandwidth: float,
    straight_through: StraightThrough,
) -> Float[Tensor, "batch d_transcoder"]:
    """`1[x > theta]`, with straight-through gradients over a rectangular window of width `bandwidth` = eps.

        d/dtheta = -(1 / eps) * 1[|x - theta| < eps/2]                              both modes
        d/dx     = 0 ("threshold"), or +(1 / eps) * 1[|x - theta| < eps/2] ("all")

    Its sum over features is L0 (Rajamanoharan et al. 2024, "JumpReLU SAEs", section 3).
    """
    return _Step.apply(hidden_pre, threshold, bandwidth, straight_through == "all")  # type: ignore[no-any-return]


SparsityKind = Literal["tanh", "l0", "quadratic_l0"]
PerLayer = Sequence[Float[Tensor, "batch d_transcoder"]]
PerFeature = Sequence[Float[Tensor, " d_transcoder"]]


@dataclass(kw_only=True, unsafe_hash=True)
class LossSettings:
    """What a user says of the loss, a part of `CLTSettings`."""

    sparsity_loss: SparsityKind = "tanh"
    """tanh, l0 or quadratic_l0. The latter two are for jumprelu. No part for topk and batchtopk."""

    sparsity_coefficient: float = 1.0
    """lambda at the end; it rises linearly from 0 over the whole run. About the squared error, summed over
    layers, that a feature must save to be worth firing. With target_l0 a guess is enough."""

    target_l0: float | None = None
    """Active features per token to ask for, in every layer. For topk and batchtopk it is k. For jumprelu and relu it
    stands in place of a lambda: each layer's is adjusted during training until that many are active ("quadratic_l0"
    leaves lambda as it is), and jumprelu's thresholds are set by held-out text at the end."""

    tanh_scale: float = 4.0
    """c of the tanh sparsity loss."""

    dead_feature_coefficient: float = 3e-6
    """lambda_P. Small dictionaries with lambda near 1 need far more, 0.01 to 0.1, to keep most features alive where
    AuxK does not; more of it raises L0. No part for topk and batchtopk."""

    far_write_coefficient: float = 0.0
    """Weight of a penalty on what features write to later layers, times the distance; none unless more than 0. It draws
    what a layer computes to that layer's own features, so that graphs skip fewer hops, for a larger error or L0."""

    auxk_coefficient: float = 1 / 32
    """Weight of AuxK, by which dead features learn what the others leave out. With 1 fewer die in a small model, but
    with 2,048 features in each of 18 layers training went astray."""

    k_aux: int | None = None
    """Dead features of each layer that it trains at a token; d_model / 2 where left out."""

    dead_feature_density: float = 1e-6
    """Share of tokens below which a feature counts as dead. Such as fire at no token of the window always do."""


# -- the terms


def mse_loss(
    recons: Float[Tensor, "batch n_layers d_model"], outputs: Float[Tensor, "batch n_layers d_model"]
) -> Float[Tensor, ""]:
    """Squared error summed over layers and d_model, mean over tokens."""
    return F.mse_loss(recons, outputs, reduction="sum") / recons.shape[0]


def tanh_count(
    feature_acts: Float[Tensor, "batch d_transcoder"], norms: Float[Tensor, " d_transcoder"], tanh_scale: float
) -> Float[Tensor, " batch"]:
    """sum_i tanh(c * ||W_dec,i|| * a_i) over one layer's features, at each token; c = `tanh_scale`.

    Written as 2 sigmoid(2z) - 1 = tanh(z), which torch computes five times as fast on the CPU.
    """
    return (2 * torch.sigmoid(feature_acts * (2 * tanh_scale * norms)) - 1).sum(dim=1)


def sparsity_loss(
    counts: Float[Tensor, "n_layers batch"],
    kind: SparsityKind,
    shares: Float[Tensor, " n_layers"] | None = None,
    target: float | None = None,
) -> Float[Tensor, ""]:
    """The sparsity term without lambda.

    Args:
        counts: N_l(x) of each layer and token.
        kind: which form.
        shares: mu_l, by which layers' lambdas differ; 1 where left out.
        target: `target_l0`, for "quadratic_l0".
    """
    if kind == "quadratic_l0":
        assert target is not None
        counts = (counts / target - 1).square()
    by_layer = counts.mean(dim=1)
    return by_layer.sum() if shares is None else shares.to(by_layer) @ by_layer


def dead_feature_loss(hidden_pre: PerLayer, thresholds: PerFeature, norms: PerFeature) -> Float[Tensor, ""]:
    """sum_i relu(theta_i - h_i) * ||W_dec,i|| over the features of all layers, mean over tokens.

    It draws features that do not fire towards their threshold. theta is 0 where phi has no threshold.
    """
    terms = [
        torch.relu(threshold - h).sum(dim=0) @ norm
        for h, threshold, norm in zip(hidden_pre, thresholds, norms, strict=True)
    ]
    return torch.stack(terms).sum() / hidden_pre[0].shape[0]


def far_write_loss(feature_acts: PerLayer, far_weights: PerFeature) -> Float[Tensor, ""]:
    """sum_i a_i * far_weight_i over the features of all layers, mean over tokens.

    Args:
        feature_acts: of each layer.
        far_weights: sum_t (t - s) * ||W_dec,i[s -> t]|| of each layer's features.
    """
    written = [acts.sum(dim=0) @ weights for acts, weights in zip(feature_acts, far_weights, strict=True)]
    return torch.stack(written).sum() / feature_acts[0].shape[0]


def auxk_loss(
    residual: Float[Tensor, "batch n_layers d_model"],
    written: Float[Tensor, "batch n_layers d_model"],
    n_dead: int,
    k_aux: int,
) -> Float[Tensor, ""]:
    """The loss, from what the chosen features write.

    Args:
        residual: e, without gradient.
        written: e_hat.
        n_dead: dead features of all layers.
        k_aux: of each layer.
    """
    share = min(1.0, n_dead / (residual.shape[1] * k_aux))
    return share * mse_loss(written, residual)


# -- lambda for an L0: what users want to say is how many features are active, not what one costs

SMOOTHING = 0.9
"""Weight of what was seen before in the running L0."""


class L0Controller:
    """Adjusts each layer's lambda so that its L0 follows a course down to the target. Stands among SAELens's
    coefficient schedulers.

    After each step, for each layer:
        log lambda <- log lambda + K_p * (e - e_before) + K_i * e,   e = log(L0 / course), held to [-1, 1]
        course = L0_first^(1 - p) * target^p,   p = min(1, step / ramp_steps)
    and lambda stays within `bounds`. L0 is a running mean, and L0_first its first value, or the target if that is more.
    L0 answers to lambda with a delay, which is the time that Adam takes to move biases: the term with K_p answers to
    where L0 is going, and the bounds limit what the other one sums up meanwhile. Gains and bounds: `run.trainer`.
    """

    def __init__(
        self,
        n_layers: int,
        target: float,
        start: float,
        ramp_steps: int,
        gains: tuple[float, float],
        bounds: tuple[float, float],
    ) -> None:
        """Before the first step.

        Args:
            n_layers: each has a lambda of its own.
            target: active features per token of each layer.
            start: lambda of the first step.
            ramp_steps: steps until the course is at its target.
            gains: K_p and K_i.
            bounds: least and greatest lambda.
        """
        self.target, self.ramp_steps, self.gains = target, ramp_steps, gains
        self.lowest, self.highest = (math.log(bound) for bound in bounds)
        self.current_step = 0
        self.log_values = torch.full((n_layers,), math.log(start), dtype=torch.float64)
        self.first, self.running, self.error = (torch.zeros(n_layers, dtype=torch.float64) for _ in range(3))
        self.n_observed = 0

    @property
    def value(self) -> float:
        """lambda: the mean over layers."""
        return float(self.log_values.exp().mean())

    @property
    def shares(self) -> Float[Tensor, " n_layers"]:
        """mu: each layer's lambda over their mean."""
        values = self.log_values.exp()
        return values / values.mean()

    def observe(self, l0: Float[Tensor, " n_layers"]) -> None:
        """A step's active features per token of each layer."""
        l0 = l0.detach().to("cpu", torch.float64)
        if self.n_observed == 0:
            self.first = self.running = l0.clamp(min=self.target)
        self.running = self.running.lerp(l0, 1 - SMOOTHING)
        self.n_observed += 1

    def step(self) -> float:
        """Adjust lambdas; gives their mean."""
        self.current_step += 1
        if self.n_observed > 0:
            share = min(1.0, self.current_step / max(1, self.ramp_steps))
            course = (1 - share) * self.first.log() + share * math.log(self.target)
            error = (self.running.clamp(min=1e-6).log() - course).clamp(-1.0, 1.0)
            change = self.gains[0] * (error - self.error) + self.gains[1] * error
            self.log_values, self.error = (self.log_values + change).clamp(self.lowest, self.highest), error
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: plain values."""
        counts = {"current_step": self.current_step, "n_observed": self.n_observed}
        return counts | {name: getattr(self, name).tolist() for name in ("log_values", "first", "running", "error")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            setattr(self, name, torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value)
