"""What is trained: the weights and start of a CLT, its forward pass and losses as they are defined, and the configs and
classes through which SAELens sees it. What a user says of it is in `config`.

`define_step` is the definition: dense tensors, plain loops over layers, autograd for everything. SAELens's own trainer
takes it. `fast.step` gives the same result in less time and memory, and is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int
from sae_lens import registry
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    SAEMetadata,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn

from tl_clt.errors import ConfigError
from tl_clt.training.config import CLTSettings, CLTShape
from tl_clt.training.losses import (
    auxk_loss,
    dead_feature_loss,
    far_write_loss,
    jumprelu,
    mse_loss,
    sparsity_loss,
    step_function,
    tanh_count,
)
from tl_clt.training.parallel import SINGLE, ProcessGrid
from tl_clt.transcoder.config import CrossLayerTranscoderConfig

ARCHITECTURE = "cross_layer_transcoder"
"""Name of a CLT in SAELens's registries."""

SMALLEST_NORM = 1e-12
"""Norms below count as this where a threshold is divided by them: such a feature writes nothing and never fires."""

THRESHOLD_RATE = 0.01
"""Weight of a step in the running mean of the smallest kept score."""

# -- configs, as SAELens sees them


@dataclass(kw_only=True)
class OfModel:
    """What a CLT's config says of the model, and how its activations were scaled."""

    n_layers: int
    """Layers of the model."""

    model_name: str = "unknown"
    """The model that it is trained on."""

    input_scale: Sequence[float] | None = None
    """Factor that each layer's inputs are multiplied by before they get here; 1 where left out."""

    output_scale: Sequence[float] | None = None
    """Factor that each layer's outputs are multiplied by before they get here; 1 where left out."""


@dataclass(kw_only=True)
class InferenceCLTConfig(CLTShape, OfModel, SAEConfig):
    """SAELens's config of a trained CLT. d_in is d_model, d_sae is n_layers * d_transcoder."""

    metadata: Any = field(default_factory=SAEMetadata)
    """SAELens's record of the training; its loader puts a plain dict here for a moment."""

    apply_b_dec_to_input: bool = False
    """Always False: outputs are not inputs."""

    @classmethod
    def architecture(cls) -> str:
        """`ARCHITECTURE`."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


@dataclass(kw_only=True)
class TrainingCLTConfig(CLTSettings, OfModel, TrainingSAEConfig):
    """SAELens's config of a CLT in training. d_in is d_model, d_sae is n_layers * d_transcoder."""

    apply_b_dec_to_input: bool = False
    """Always False: outputs are not inputs."""

    decoder_init_norm: float | None = None
    """Always None: decoders start uniform, and a run's as `init_from_tokens` has it."""

    sparsity_warm_up_steps: int = 0
    """Steps over which lambda rises linearly from 0, or the controller's L0 falls to its target."""

    @classmethod
    def architecture(cls) -> str:
        """`ARCHITECTURE`."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selects and self.k is None:
            self.k = self.k_asked_for()
        _check(self)


CLTConfig: TypeAlias = InferenceCLTConfig | TrainingCLTConfig


def transcoder_config(cfg: CLTConfig) -> CrossLayerTranscoderConfig:
    """The config of the `CrossLayerTranscoder` that a CLT becomes.

    Raises:
        ConfigError: a value is out of range.
    """
    if cfg.has_score_threshold and cfg.k is None:
        raise ConfigError(f"k is None with activation {cfg.activation!r}: topk and batchtopk need k.")
    return CrossLayerTranscoderConfig(
        n_layers=cfg.n_layers,
        d_model=cfg.d_in,
        d_transcoder=cfg.d_transcoder,
        span=cfg.span,
        activation="jumprelu" if cfg.has_score_threshold else cfg.activation,
        k=None if cfg.has_score_threshold else cfg.k,
        skip=cfg.skip,
        input_hook=cfg.input_hook,
        output_hook=cfg.output_hook,
        model_name=cfg.model_name,
        dtype=cfg.dtype,
        input_scale=None if cfg.input_scale is None else tuple(cfg.input_scale),
        output_scale=None if cfg.output_scale is None else tuple(cfg.output_scale),
    )


def _check(cfg: CLTConfig) -> None:
    transcoder_config(cfg)
    n_features = cfg.n_layers * cfg.d_transcoder
    if cfg.d_sae != n_features:
        raise ConfigError(f"d_sae is {cfg.d_sae}: it must be n_layers * d_transcoder = {n_features}.")
    if cfg.normalize_activations != "none" or cfg.apply_b_dec_to_input:
        raise ConfigError(
            "A CLT is trained with normalize_activations='none' and apply_b_dec_to_input=False:"
            " each layer's inputs and outputs are scaled before they reach SAELens's trainer."
        )


# -- weights


class CLTWeights:
    """Weights of a CLT, mixed into SAELens's `SAE` and `TrainingSAE`, one tensor a source layer unless said otherwise.

        W_enc [d_transcoder, d_model], b_enc [d_transcoder],
        W_dec [d_transcoder, n_writes * d_model], or with `far_rank` [d_transcoder, d_model + n_far * far_rank] and
        W_far [n_far, far_rank, d_model] for all layers but the last,
        log_threshold [d_transcoder] (jumprelu only), W_skip [d_model, d_model] (`skip` only; x @ W_skip),
        b_dec [n_layers, d_model] for all layers, and where scores have a threshold at inference, score_threshold
        [n_layers], which is no parameter but a running mean.

    Each source layer's weights are parameters of their own: a slice of one stacked parameter would fill a gradient of
    the whole stack with zeros for every slice taken. A layer's decoder vectors lie side by side, so that what it writes
    to all its targets is one matrix product.

    Features of a layer mostly write to the layer itself; what they write further on is a small part of the result and
    most of the weights. With `far_rank` = r a layer's own decoder and all its A lie side by side, [own | A_1 | ...]:
        W_dec[s -> s] is full,   W_dec[s -> t] = A[s -> t] @ W_far[s -> t]   for t > s,   A [d_transcoder, r]

    On a grid of processes, d_transcoder is the rank's share in all of them; `cfg` stays that of the whole CLT.
    """

    grid: ProcessGrid = SINGLE
    """The processes that the features are split among."""

    cfg: Any
    dtype: torch.dtype
    device: torch.device
    training: bool
    register_buffer: Any
    W_enc: Any
    b_enc: Any
    W_dec: Any
    W_far: Any
    W_skip: Any
    b_dec: Any
    log_threshold: Any
    score_threshold: Any

    def initialize_weights(self) -> None:
        """W_enc ~ U(+-1/sqrt(d_transcoder)), W_dec ~ U(+-1/sqrt(n_layers * d_model)), biases and W_skip 0 (Methods).

        A run then begins with what `init_from_tokens` makes of that.

        W_far ~ U(+-sqrt(3 / far_rank)), so that the decoders it makes have W_dec's variance.

        Each rank draws the weights of all features, one tensor at a time, and keeps its own: the same seed gives
        the same CLT on any number of processes.
        """
        cfg: CrossLayerTranscoderConfig = self.transcoder_config
        placement = {"dtype": self.dtype, "device": self.device}

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **placement).uniform_(-bound, bound))

        def own_rows(whole: nn.Parameter) -> nn.Parameter:
            return whole if n_own == n_features else nn.Parameter(whole.data[self.grid.own(n_features)].clone())

        def constant(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, **placement))

        layers, n_features, rank = range(cfg.n_layers), cfg.d_transcoder, self.cfg.far_rank
        n_own = self.n_own_features
        enc_bound, dec_bound = n_features**-0.5, (cfg.n_layers * cfg.d_model) ** -0.5
        n_far = [len(cfg.targets(s)) - 1 for s in layers]
        far_width = cfg.d_model if rank is None else rank
        self.W_enc = nn.ParameterList([own_rows(uniform(enc_bound, n_features, cfg.d_model)) for _ in layers])
        self.b_enc = nn.ParameterList([constant(0.0, n_own) for _ in layers])
        widths = [cfg.d_model + n * far_width for n in n_far]
        self.W_dec = nn.ParameterList([own_rows(uniform(dec_bound, n_features, width)) for width in widths])
        self.W_far = None
        if rank is not None:
            self.W_far = nn.ParameterList([uniform((3 / rank) ** 0.5, n, rank, cfg.d_model) for n in n_far if n > 0])
        self.W_skip = None
        if cfg.skip:
            self.W_skip = nn.ParameterList([constant(0.0, cfg.d_model, cfg.d_model) for _ in layers])
        self.b_dec = constant(0.0, cfg.n_layers, cfg.d_model)
        self.log_threshold = None
        if self.cfg.activation == "jumprelu":
            start = float(torch.tensor(self.cfg.jumprelu_init_threshold, dtype=torch.float64).log())
            self.log_threshold = nn.ParameterList([constant(start, n_own) for _ in layers])
        if self.cfg.has_score_threshold:
            self.register_buffer("score_threshold", torch.zeros(cfg.n_layers, dtype=self.sum_dtype, device=self.device))

    @property
    def transcoder_config(self) -> CrossLayerTranscoderConfig:
        """Shape, activation and hooks, as the exported CLT has them."""
        return transcoder_config(self.cfg)

    @property
    def targets(self) -> list[range]:
        """The layers that each source layer writes to."""
        cfg = self.transcoder_config
        return [cfg.targets(source) for source in range(cfg.n_layers)]

    @property
    def n_own_features(self) -> int:
        """Features per layer that this rank holds."""
        return self.grid.n_own(self.cfg.d_transcoder)

    @property
    def sum_dtype(self) -> torch.dtype:
        """Number type of activations and sums in training: that of the weights, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def far(self, source: int) -> Float[Tensor, "n_far rank d_model"] | None:
        """What the far columns of a layer's W_dec are multiplied with; None where there are none of low rank."""
        return None if self.W_far is None or source >= len(self.W_far) else self.W_far[source]

    def decoders(self, dtype: torch.dtype | None = None) -> list[dict[int, Float[Tensor, "d_transcoder d_model"]]]:
        """For each source layer, `W_dec[s -> t]` by target layer.

        Args:
            dtype: that they are to have; `sum_dtype` where left out.
        """
        kind, result = dtype or self.sum_dtype, []
        for source, (W, targets) in enumerate(zip(self.W_dec, self.targets, strict=True)):
            W, far = W.to(kind), self.far(source)
            if far is None:
                blocks = W.split(self.cfg.d_in, dim=1)
            else:
                near, *thin = W.split([self.cfg.d_in, *[self.cfg.far_rank] * len(far)], dim=1)
                blocks = [near, *(A @ B for A, B in zip(thin, far.to(kind), strict=True))]
            result.append(dict(zip(targets, blocks, strict=True)))
        return result

    def norms(self, dtype: torch.dtype | None = None) -> list[Float[Tensor, " d_transcoder"]]:
        """||W_dec,i||: for each source layer, each feature's norm over the concatenation of its decoder vectors."""
        return [torch.cat(list(pairs.values()), dim=1).norm(dim=1) for pairs in self.decoders(dtype)]

    def far_weights(self, source: int, dtype: torch.dtype | None = None) -> Float[Tensor, " d_transcoder"]:
        """sum_{t > s} (t - s) * ||W_dec,i[s -> t]|| of the features of layer s.

        Decoders of low rank are not made: ||A_i B|| is the root of A_i (B B^T) A_i^T.

        Args:
            source: the layer.
            dtype: that they are to have; `sum_dtype` where left out.
        """
        kind, far, n_far = dtype or self.sum_dtype, self.far(source), len(self.targets[source]) - 1
        far_columns = self.W_dec[source][:, self.cfg.d_in :].to(kind)
        if n_far == 0:
            return far_columns.sum(dim=1)
        slots = far_columns.unflatten(1, (n_far, -1))
        if far is None:
            norms = slots.norm(dim=2)
        else:
            B = far.to(kind)
            squares = (torch.einsum("fjr,jrq->fjq", slots, B @ B.mT) * slots).sum(dim=2)
            norms = squares.clamp_min(SMALLEST_NORM**2).sqrt()
        return norms @ torch.arange(1, norms.shape[1] + 1, dtype=kind, device=norms.device)

    def thresholds(self) -> list[Float[Tensor, " d_transcoder"]]:
        """theta of each layer's features, in units of hidden_pre: 0 where phi has no threshold.

        A threshold of scores is one of hidden_pre: hidden_pre * ||W_dec,i|| > t is hidden_pre > t / ||W_dec,i||.
        """
        if self.cfg.has_score_threshold:
            norms = [norm.detach().clamp(min=SMALLEST_NORM) for norm in self.norms()]
            return [t / norm for t, norm in zip(self.score_threshold, norms, strict=True)]
        if self.log_threshold is None:
            return [torch.zeros_like(b) for b in self.b_enc]
        return [log.exp() for log in self.log_threshold]

    @property
    def selects_in_batch(self) -> bool:
        """Whether features compete with those of the batch and of other layers, or with a fixed threshold."""
        return self.training


# -- the start: every feature stands for a token, hidden_pre of all is above theta at the same, known rate, and b_dec is
# the mean output

COVARIANCE_FLOOR = 0.1
"""What is added to the variance of inputs in every direction, as a share of the mean variance."""


@torch.no_grad()
def init_from_tokens(
    clt: TrainingCLT,
    inputs: Float[Tensor, "batch n_layers d_model"],
    outputs: Float[Tensor, "batch n_layers d_model"],
) -> None:
    """Begin each feature as a detector of one token, which writes what the model writes there; then set the biases.

        W_enc,i  proportional to C^-1 (x_n - mean x),   such that W_enc,i C W_enc,i^T = 1
        W_dec,i  proportional to y_n - mean y,   side by side for all layers that it writes to, as long as it was

    with C the covariance of the layer's inputs plus a floor in every direction, and n a token drawn for the feature; so
    all hidden_pre vary alike. Of all directions this one tells the token best from the others (Fisher's discriminant).
    Inputs vary in a few directions far more than in the others: with random encoders the same few features win at every
    token, and many die before they learn anything. Features for which no token is left get one that another has, and
    random directions besides. With `far_rank`, what is written to later layers stays random.

    Args:
        clt: changed in place.
        inputs: scaled inputs of some tokens, on a grid the same for every rank.
        outputs: scaled outputs of the same tokens.
    """
    n, n_features, own = len(inputs), clt.cfg.d_transcoder, clt.grid.own(clt.cfg.d_transcoder)
    means = [y.double().mean(dim=0) for y in outputs.unbind(dim=1)]
    for layer, targets in enumerate(clt.targets):
        x = inputs[:, layer].double()
        x = x - x.mean(dim=0)
        covariance, factor = _floored_covariance(x)
        drawn = torch.randperm(n)[torch.arange(n_features) % n][own].to(x.device)
        noise = torch.randn(n_features, x.shape[1], dtype=torch.float64)[own].to(x.device)
        noise[: max(0, min(n - (own.start or 0), len(noise)))] = 0.0  # features past the n-th alone have some
        # C^-1 (x_n + C^1/2 noise): the noise is as large as a token's own deviation from the mean.
        clt.W_enc[layer].copy_(_unit_variance(x[drawn] + noise @ factor.T, covariance, factor))
        written = targets if clt.cfg.far_rank is None else targets[:1]
        W_dec = clt.W_dec[layer][:, : len(written) * clt.cfg.d_in]
        toward = torch.cat([outputs[drawn, t].double() - means[t] for t in written], dim=1)
        size = W_dec.double().norm(dim=1, keepdim=True) / toward.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
        W_dec.copy_(toward * size)
    init_encoder_biases(clt, inputs)
    init_decoder_biases(clt, outputs)


@torch.no_grad()
def discriminants(x: Float64[Tensor, "batch d_model"], drawn: Int[Tensor, " n"]) -> Float64[Tensor, "n d_model"]:
    """The encoders of `init_from_tokens` for tokens of a layer.

    Args:
        x: the layer's inputs.
        drawn: the tokens.
    """
    x = x - x.mean(dim=0)
    return _unit_variance(x[drawn], *_floored_covariance(x))


def _floored_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """C of centred inputs, and its Cholesky factor."""
    covariance = x.T @ x / len(x)
    covariance.diagonal().add_((COVARIANCE_FLOOR * covariance.diagonal().mean()).clamp(min=SMALLEST_NORM))
    return covariance, torch.linalg.cholesky(covariance)


def _unit_variance(x: Tensor, covariance: Tensor, factor: Tensor) -> Tensor:
    """C^-1 x, such that W C W^T = 1 for each row."""
    W = torch.cholesky_solve(x.T, factor).T
    return W / (W @ covariance * W).sum(dim=1, keepdim=True).sqrt().clamp(min=SMALLEST_NORM)


FIRING_BUDGET = 10_000
"""Features that fire at one token at the start, over all layers, where the dictionary is large."""

CHUNK_ELEMENTS = 2**24
"""Pre-activations held at a time."""


def initial_firing_rate(n_features: int) -> float:
    """min(0.5, 10000 / features of all layers): the share of tokens at which a feature fires at first."""
    return min(0.5, FIRING_BUDGET / n_features)


@torch.no_grad()
def init_encoder_biases(clt: TrainingCLT, inputs: Float[Tensor, "batch n_layers d_model"]) -> None:
    """Set b_enc to theta minus a quantile of `x @ W_enc.T`, so that each feature fires at `initial_firing_rate`.

    The quantile lies between two tokens, so that rounding does not decide whether one of them fires.

    Args:
        clt: changed in place.
        inputs: scaled inputs of some tokens, on a grid the same for every rank. The fewer there are, the coarser
            the rate.
    """
    n_tokens = len(inputs)
    n_firing = round(initial_firing_rate(clt.cfg.d_sae) * n_tokens)
    rank = min(max(n_tokens - n_firing, 1), n_tokens)
    width = max(1, CHUNK_ELEMENTS // n_tokens)
    for layer, threshold in enumerate(clt.thresholds()):
        x = inputs[:, layer]
        for start in range(0, clt.n_own_features, width):
            part = slice(start, start + width)
            h = _sorted((x @ clt.W_enc[layer][part].T).T)
            clt.b_enc[layer][part] = threshold[part] - (h[:, rank - 1] + h[:, min(rank, n_tokens - 1)]) / 2


def _sorted(rows: Float[Tensor, "n_rows width"]) -> Float[Tensor, "n_rows width"]:
    """Each row in ascending order, at least in float32. On the CPU numpy takes a twentieth of torch's time."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
    if rows.device.type != "cpu":
        return rows.sort(dim=1).values
    rows.numpy().sort(axis=1)
    return rows


@torch.no_grad()
def init_decoder_biases(clt: TrainingCLT, outputs: Float[Tensor, "batch n_layers d_model"]) -> None:
    """Set b_dec to the mean of scaled outputs, which is the best that a CLT without features can write."""
    clt.b_dec.copy_(outputs.double().mean(dim=0))


# -- the definition: forward pass and losses


class LayerFeatures(NamedTuple):
    """One layer's activations at a batch of tokens."""

    dense: Callable[[], Float[Tensor, "batch d_transcoder"]]
    """Gives all activations, without gradients."""

    fired: Int[Tensor, " d_transcoder"]
    """Tokens at which each feature fires."""


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

    smallest_kept: Float[Tensor, " n_layers"] | None
    """Smallest score that selection kept in each layer, mean over tokens; None without selection."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The sum of the terms."""
        return torch.stack(list(self.losses.values())).sum()

    @property
    def fired(self) -> Int[Tensor, " d_sae"]:
        """Tokens at which each feature of all layers fires."""
        return torch.cat([f.fired for f in self.features])


class Encoding(NamedTuple):
    """What features make of a batch of tokens."""

    hidden_pre: Float[Tensor, "batch n_layers d_transcoder"]
    """Before phi."""

    feature_acts: Float[Tensor, "batch n_layers d_transcoder"]
    """After phi."""

    smallest_kept: Float[Tensor, " n_layers"] | None
    """See `CLTStep`."""


def encode(clt: InferenceCLT | TrainingCLT, x: Float[Tensor, "batch n_layers d_model"], k: int | None) -> Encoding:
    """hidden_pre[s] = x[s] @ W_enc[s].T + b_enc[s],   feature_acts[s] = phi(hidden_pre[s])

    TopK and BatchTopK keep what scores, by hidden_pre * ||W_dec,i||, at least `smallest_kept_scores` and more than 0;
    at inference, what scores more than `score_threshold` where there is one.

    Args:
        clt: a whole one.
        x: scaled inputs.
        k: for topk and batchtopk.
    """
    cfg = clt.cfg
    pairs = zip(x.unbind(dim=1), clt.W_enc, clt.b_enc, strict=True)
    hidden_pre = torch.stack([x_s @ W.T.to(x.dtype) + b.to(x.dtype) for x_s, W, b in pairs], dim=1)
    if cfg.selects:
        scores = (hidden_pre * torch.stack(clt.norms())).detach()
        if cfg.has_score_threshold and not clt.selects_in_batch:
            smallest = clt.score_threshold
            kept = scores > smallest[:, None]
        else:
            assert k is not None
            lowest = smallest_kept_scores(cfg, scores, k)
            smallest = lowest.mean(dim=0).expand(cfg.n_layers)
            kept = (scores >= lowest[..., None]) & (scores > 0)
        return Encoding(hidden_pre, torch.relu(hidden_pre) * kept, smallest)
    if cfg.activation == "relu":
        return Encoding(hidden_pre, torch.relu(hidden_pre), None)
    straight = (cfg.jumprelu_bandwidth, cfg.straight_through)
    layers = zip(hidden_pre.unbind(dim=1), clt.thresholds(), strict=True)
    acts = [jumprelu(h, theta.to(h.dtype), *straight) for h, theta in layers]
    return Encoding(hidden_pre, torch.stack(acts, dim=1), None)


def smallest_kept_scores(
    cfg: CLTShape, scores: Float[Tensor, "batch n_layers d_transcoder"], k: int
) -> Float[Tensor, "batch_or_1 n_layers_or_1"]:
    """The smallest score that is kept, by sorting all that compete:

        topk, per layer           the k-th largest score of the token in the layer
        topk, across layers       the (k * n_layers)-th largest of the token in all layers
        batchtopk, per layer      the (k * batch)-th largest of the batch in the layer, or 0 if that is more
        batchtopk, across layers  the (k * batch * n_layers)-th largest of the batch in all layers, likewise

    so that k is the mean number of features per layer and token in each.
    """
    competing, n_kept, (n_tokens, n_layers, _) = scores, k, scores.shape
    if cfg.activation == "batchtopk":
        competing, n_kept = rearrange(competing, "token layer feature -> 1 layer (token feature)"), n_kept * n_tokens
    if cfg.topk_across == "all_layers":
        competing, n_kept = rearrange(competing, "token layer feature -> token 1 (layer feature)"), n_kept * n_layers
    smallest = competing.sort(dim=-1, descending=True).values[..., n_kept - 1]
    return smallest.clamp(min=0) if cfg.activation == "batchtopk" else smallest


def decode(
    clt: InferenceCLT | TrainingCLT,
    feature_acts: Float[Tensor, "batch n_layers d_transcoder"],
    x: Float[Tensor, "batch n_layers d_model"] | None = None,
) -> Float[Tensor, "batch n_layers d_model"]:
    """recons[t] = sum_s feature_acts[s] @ W_dec[s -> t] + b_dec[t] (+ x[t] @ W_skip[t])

    Args:
        clt: a whole one.
        feature_acts: of all layers.
        x: scaled inputs, which a skip connection needs.

    Raises:
        ConfigError: there is a skip connection, and no x.
    """
    if clt.W_skip is not None and x is None:
        raise ConfigError("This CLT has a skip connection, which reads the inputs: decode needs them.")
    recons = [b.to(feature_acts.dtype).expand(len(feature_acts), -1) for b in clt.b_dec]
    for source, pairs in enumerate(clt.decoders(feature_acts.dtype)):
        for target, W in pairs.items():
            recons[target] = recons[target] + feature_acts[:, source] @ W
    if clt.W_skip is not None and x is not None:
        recons = [y + x[:, t] @ clt.W_skip[t].to(x.dtype) for t, y in enumerate(recons)]
    return torch.stack(recons, dim=1)


def define_step(clt: TrainingCLT, step_input: TrainStepInput) -> CLTStep:
    """The forward pass and the losses of a step on scaled activations [batch, 2, n_layers, d_model]: the definition.

    In training mode features are selected within the batch; otherwise as at inference.

    Raises:
        ConfigError: the CLT is split among several processes.
    """
    cfg, coefficients = clt.cfg, step_input.coefficients
    if clt.grid.n_processes > 1:
        raise ConfigError(f"This CLT is split among {clt.grid.n_processes} processes: train it with CLTTrainingRunner.")
    inputs, outputs = step_input.sae_in.to(clt.sum_dtype).unbind(dim=1)
    hidden_pre, acts, smallest_kept = encode(clt, inputs, cfg.k_at(step_input.n_training_steps))
    recons = decode(clt, acts, inputs)
    losses = {"mse_loss": mse_loss(recons, outputs)}
    pre_by_layer, acts_by_layer = hidden_pre.unbind(dim=1), acts.unbind(dim=1)
    losses |= _define_auxk(clt, hidden_pre, (outputs - recons).detach(), step_input)
    if not cfg.selects:
        norms, thresholds = clt.norms(), [t.to(acts.dtype) for t in clt.thresholds()]
        straight = (cfg.jumprelu_bandwidth, cfg.straight_through)
        if cfg.sparsity_loss == "tanh":
            counts = [tanh_count(a, norm, cfg.tanh_scale) for a, norm in zip(acts_by_layer, norms, strict=True)]
        else:
            counts = [step_function(h, t, *straight).sum(dim=1) for h, t in zip(pre_by_layer, thresholds, strict=True)]
        sparsity = sparsity_loss(torch.stack(counts), cfg.sparsity_loss, clt.sparsity_shares, cfg.target_l0)
        losses["sparsity_loss"] = coefficients["sparsity"] * sparsity
        if coefficients["dead_feature"] > 0:
            losses["dead_feature_loss"] = coefficients["dead_feature"] * dead_feature_loss(
                pre_by_layer, thresholds, norms
            )
    if coefficients.get("far_write", 0.0) > 0:
        losses["far_write_loss"] = coefficients["far_write"] * far_write_loss(acts_by_layer, _define_far_weights(clt))
    features = [LayerFeatures(a.detach, a.count_nonzero(dim=0)) for a in acts_by_layer]
    return CLTStep(recons, losses, features, [h.detach() for h in pre_by_layer], smallest_kept)


def _define_far_weights(clt: TrainingCLT) -> list[Tensor]:
    """As `CLTWeights.far_weights`, of whole decoders."""
    result = []
    for source, pairs in enumerate(clt.decoders()):
        norms = [(target - source) * W.norm(dim=1) for target, W in pairs.items() if target > source]
        result.append(torch.stack([torch.zeros_like(clt.b_enc[source]), *norms]).sum(dim=0))
    return result


def _define_auxk(
    clt: TrainingCLT, hidden_pre: Tensor, residual: Tensor, step_input: TrainStepInput
) -> dict[str, Tensor]:
    """AuxK: see `losses`. Nothing where no feature is dead."""
    coefficient, dead = step_input.coefficients.get("auxk", 0.0), step_input.dead_neuron_mask
    if dead is None or coefficient == 0 or not dead.any():
        return {}
    k_aux, chosen = clt.cfg.k_aux or clt.cfg.d_in // 2, torch.zeros_like(hidden_pre)
    for layer, mask in enumerate(dead.unflatten(0, (clt.cfg.n_layers, -1))):
        ranked = torch.where(mask, hidden_pre[:, layer].detach(), -torch.inf).argsort(dim=1, descending=True)
        chosen[:, layer].scatter_(1, ranked[:, : min(k_aux, int(mask.sum()))], 1.0)
    written = decode(clt, hidden_pre * chosen, torch.zeros_like(residual)) - clt.b_dec.to(hidden_pre.dtype)
    return {"auxk_loss": coefficient * auxk_loss(residual, written, int(dead.sum()), k_aux)}


Step: TypeAlias = "Callable[[TrainingCLT, TrainStepInput], CLTStep]"
"""`define_step`, or what gives the same: `fast.step.FastStep`."""


# -- as SAELens sees it


class InferenceCLT(CLTWeights, SAE[InferenceCLTConfig]):
    """A trained CLT, on scaled inputs, as SAELens loads it. For everything else export a `CrossLayerTranscoder`."""

    def encode(self, x: Float[Tensor, "batch n_layers d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of scaled inputs, flattened over layers."""
        return encode(self, x.to(self.dtype), self.cfg.k).feature_acts.flatten(start_dim=1)

    def decode(self, feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch n_layers d_model"]:
        """Scaled outputs of flattened activations.

        Raises:
            ConfigError: the CLT has a skip connection.
        """
        return decode(self, feature_acts.unflatten(-1, (self.cfg.n_layers, -1)))

    @property
    def selects_in_batch(self) -> bool:
        """Never."""
        return False


class TrainingCLT(CLTWeights, TrainingSAE[TrainingCLTConfig]):
    """A CLT in training. Its input is [batch, 2, n_layers, d_model]: scaled inputs, then scaled outputs."""

    last_losses: dict[str, Tensor]
    """Terms of the last step's loss, without gradients."""

    sparsity_shares: Float[Tensor, " n_layers"] | None = None
    """mu of `losses`: each layer's lambda over their mean; the trainer sets them."""

    in_own_trainer: bool = False
    """Whether `CLTTrainer` trains it, which does more for it than SAELens's own trainer."""

    def __init__(self, cfg: TrainingCLTConfig, use_error_term: bool = False, grid: ProcessGrid = SINGLE) -> None:
        """Make a CLT with fresh weights.

        Args:
            cfg: of the whole CLT.
            use_error_term: SAELens's; no part in training.
            grid: the processes that its features are split among. This one's share of them is made.

        Raises:
            ConfigError: the features cannot be split equally.
        """
        self.grid = grid
        super().__init__(cfg, use_error_term)
        self.last_losses = {}

    def step(self, step_input: TrainStepInput, step: Step = define_step) -> CLTStep:
        """One step's losses and activations, layer by layer. In training mode the running threshold follows.

        Args:
            step_input: as SAELens's trainer makes it.
            step: computes them.
        """
        result = step(self, step_input)
        if self.cfg.has_score_threshold and self.training and result.smallest_kept is not None:
            rate = max(1 / (step_input.n_training_steps + 1), THRESHOLD_RATE)
            self.score_threshold.lerp_(result.smallest_kept.to(self.score_threshold.dtype), rate)
        self.last_losses = {name: value.detach() for name, value in result.losses.items()}
        return result

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses and activations, all flattened over layers as SAELens's metrics expect.

        `sae_in` and `sae_out` of the result are the scaled outputs and their reconstruction,
        [batch, n_layers * d_model]; `feature_acts` and `hidden_pre` are [batch, n_layers * d_transcoder] and
        carry no gradient (the loss does).
        """
        step = self.step(step_input)
        acts = torch.cat([f.dense() for f in step.features], dim=1)
        return self.step_output(step, step_input, acts, torch.cat(step.hidden_pre, dim=1))

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """lambda and lambda_P for SAELens's schedulers, and the weights of AuxK and of far writes.

        Raises:
            ConfigError: the config asks for what SAELens's own trainer would leave undone.
        """
        if not self.in_own_trainer:
            _require_plain_training(self.cfg)
        for_all = {"auxk": self.cfg.auxk_coefficient}
        if self.cfg.far_write_coefficient > 0:
            for_all["far_write"] = self.cfg.far_write_coefficient
        if self.cfg.selects:
            return for_all
        return for_all | {
            "dead_feature": self.cfg.dead_feature_coefficient,
            "sparsity": TrainCoefficientConfig(self.cfg.sparsity_coefficient, self.cfg.sparsity_warm_up_steps),
        }

    def count_firing(self, step: CLTStep) -> Int[Tensor, " d_sae"]:
        """Tokens of a step at which each feature fires: of all layers, all ranks' features, all ranks' tokens."""
        own = torch.stack([features.fired for features in step.features])
        return self.grid.all_features(self.grid.add_over_data(own), dim=1).flatten()

    def l0_per_layer(self, fired: Int[Tensor, " d_sae"], n_tokens: int) -> Float64[Tensor, " n_layers"]:
        """Features that fire at a token, of each layer.

        Args:
            fired: tokens at which each feature fired: see `count_firing`.
            n_tokens: of how many.
        """
        return fired.unflatten(0, (self.cfg.n_layers, -1)).sum(dim=1).double() / max(n_tokens, 1)

    def step_output(
        self, step: CLTStep, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor
    ) -> TrainStepOutput:
        """A step as SAELens's trainer takes it, with the flattened activations given."""
        metrics: dict[str, Any] = {}
        outputs = step_input.sae_in[:, 1].to(self.sum_dtype).flatten(start_dim=1)
        recons = step.recons.detach().flatten(start_dim=1)
        if step_input.is_logging_step:
            # SAELens logs what it is given here: on a grid, of the whole batch and all features.
            outputs, recons = self.grid.all_tokens(outputs), self.grid.all_tokens(recons)
            metrics["l0"] = self.count_firing(step).sum() / len(recons)
            metrics["l0_mean_per_layer"] = metrics["l0"] / self.cfg.n_layers
        return TrainStepOutput(
            sae_in=outputs,
            sae_out=recons,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=step.loss,
            losses=step.losses,
            metrics=metrics,
        )

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "batch n_layers d_model"]
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
        """(feature_acts, hidden_pre) of scaled inputs, flattened over layers: what SAELens encodes with."""
        hidden_pre, feature_acts, _ = encode(self, x.to(self.dtype), self.cfg.k)
        return feature_acts.flatten(start_dim=1), hidden_pre.flatten(start_dim=1)

    def decode(self, feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch n_layers d_model"]:
        """Scaled outputs of flattened activations.

        Raises:
            ConfigError: the CLT has a skip connection.
        """
        return decode(self, feature_acts.unflatten(-1, (self.cfg.n_layers, -1)))

    def calculate_aux_loss(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Not offered: SAELens requires it for a forward pass of its own, in the place of which stands ours.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("The losses of a CLT are those of its step: call training_forward_pass instead.")

    @torch.no_grad()
    def log_histograms(self) -> dict[str, Any]:
        """Norms of the decoder, for wandb."""
        return {"weights/W_dec_norms": self.get_W_dec_norm().float().cpu().numpy()}

    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """||W_dec,i|| of every feature, on whatever rank, flattened over layers."""
        return torch.cat([self.grid.all_features(norms.detach(), dim=0) for norms in self.norms()])

    def fold_W_dec_norm(self) -> None:
        """Not offered.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("A CLT's decoder norms are not folded: export a CrossLayerTranscoder instead.")


def _require_plain_training(cfg: TrainingCLTConfig) -> None:
    """Raise where a config asks for what `CLTTrainer` alone does."""
    mend = "or train with tl_clt's CLTTrainingRunner."
    if cfg.target_l0 is not None and not cfg.selects and cfg.sparsity_loss != "quadratic_l0":
        raise ConfigError(
            f"target_l0 is {cfg.target_l0:g}, which SAELens's SAETrainer would ignore: it does not adjust lambda. Leave"
            " target_l0 out and set sparsity_coefficient, use sparsity_loss='quadratic_l0' (with jumprelu) or a topk"
            f" activation, {mend}"
        )
    density = CLTSettings.dead_feature_density
    if cfg.dead_feature_density != density:
        raise ConfigError(
            f"dead_feature_density is {cfg.dead_feature_density:g}, which SAELens's SAETrainer would ignore: it counts"
            " as dead what has not fired for dead_feature_window steps of its own config. Leave dead_feature_density"
            f" out, {mend}"
        )


def register() -> None:
    """Make SAELens know CLTs: its configs look their classes up by name. Doing it twice changes nothing."""
    if ARCHITECTURE not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class(ARCHITECTURE, InferenceCLT, InferenceCLTConfig)
    if ARCHITECTURE not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(ARCHITECTURE, TrainingCLT, TrainingCLTConfig)


register()
