"""A CLT in training: its configs, its weights and their start, its two passes, and the classes that SAELens sees.

Each source layer's weights are parameters of their own: a slice of one stacked parameter would fill a gradient of the
whole stack with zeros for every slice taken. A layer's decoder vectors lie side by side, so that what it writes to
all its targets is one matrix product. At the start every feature fires at the same, known rate, and the CLT writes the
mean output. SAELens's trainer takes a CLT as a `TrainingSAE`, registered under `ARCHITECTURE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
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
from tl_clt.training.fast.products import far_norms, full_decoder
from tl_clt.training.fast.selection import batch_threshold, token_thresholds
from tl_clt.training.fast.step import CLTStep, Workspace, clt_step
from tl_clt.training.losses import (
    Across,
    SparsityKind,
    StraightThrough,
    dead_feature_loss,
    decoder_norms,
    jumprelu,
    sparsity_loss,
    step_function,
    tanh_count,
)
from tl_clt.training.parallel import SINGLE, ProcessGrid
from tl_clt.transcoder.config import Activation, CrossLayerTranscoderConfig

ARCHITECTURE = "cross_layer_transcoder"
"""Name of a CLT in SAELens's registries."""


SMALLEST_NORM = 1e-12
"""Norms below count as this where a threshold is divided by them: such a feature writes nothing and never fires."""


class LayerEncoding(NamedTuple):
    """One layer's features at a batch of tokens."""

    feature_acts: Float[Tensor, "batch d_transcoder"]
    """After phi."""

    hidden_pre: Float[Tensor, "batch d_transcoder"]
    """Before phi."""


@dataclass(kw_only=True)
class CLTShape:
    """What a CLT's weights look like and how they were scaled: shared by SAELens's training and inference configs."""

    n_layers: int
    """Layers of the model."""

    d_transcoder: int
    """Features per layer."""

    span: int | None = None
    """Layers a feature writes to; n_layers where left out."""

    activation: Activation = "jumprelu"
    """relu, jumprelu, topk or batchtopk."""

    k: int | None = None
    """Features kept per layer and token, in the mean; for topk and batchtopk."""

    topk_across: Across = "layer"
    """What k is counted over: each layer by itself, or all layers together."""

    skip: bool = False
    """Whether each layer adds a linear map of its own input."""

    far_rank: int | None = None
    """Rank of the decoders to later layers; full where left out."""

    jumprelu_init_threshold: float = 0.03
    """Threshold of every feature at the start."""

    jumprelu_bandwidth: float = 1.0
    """Width of the window in which the straight-through gradient acts, in units of hidden_pre."""

    straight_through: StraightThrough = "all"
    """Whether that gradient reaches hidden_pre as well ("all") or the threshold only ("threshold")."""

    model_name: str = "unknown"
    """The model that it is trained on."""

    input_hook: str = "hook_resid_mid"
    """Hook that features read, within a block."""

    output_hook: str = "hook_mlp_out"
    """Hook that features write, within a block."""

    input_scale: Sequence[float] | None = None
    """Factor that each layer's inputs are multiplied by before they get here; 1 where left out."""

    output_scale: Sequence[float] | None = None
    """Factor that each layer's outputs are multiplied by before they get here; 1 where left out."""

    @property
    def selects(self) -> bool:
        """Whether features are chosen by rank (topk, batchtopk), and not by a threshold of their own."""
        return self.activation in ("topk", "batchtopk")

    @property
    def has_score_threshold(self) -> bool:
        """Whether inference compares scores with a fixed threshold, because what competes is not known then.

        One token knows nothing of its batch, and a layer of a model nothing of the layers above.
        """
        return self.activation == "batchtopk" or (self.selects and self.topk_across == "all_layers")

    def transcoder_config(self, d_model: int, dtype: str) -> CrossLayerTranscoderConfig:
        """The config of the `CrossLayerTranscoder` that this one becomes.

        Raises:
            ConfigError: a value is out of range.
        """
        if self.has_score_threshold and self.k is None:
            raise ConfigError(f"k is None with activation {self.activation!r}: topk and batchtopk need k.")
        return CrossLayerTranscoderConfig(
            n_layers=self.n_layers,
            d_model=d_model,
            d_transcoder=self.d_transcoder,
            span=self.span,
            activation="jumprelu" if self.has_score_threshold else self.activation,
            k=None if self.has_score_threshold else self.k,
            skip=self.skip,
            input_hook=self.input_hook,
            output_hook=self.output_hook,
            model_name=self.model_name,
            dtype=dtype,
            input_scale=None if self.input_scale is None else tuple(self.input_scale),
            output_scale=None if self.output_scale is None else tuple(self.output_scale),
        )


class CLTLayers:
    """Weights and passes of a CLT, mixed into SAELens's `SAE` and `TrainingSAE`.

    The passes here are the plain definition; training takes those of `step`.

    Weights, one tensor a source layer unless said otherwise:
        W_enc [d_transcoder, d_model], b_enc [d_transcoder],
        W_dec [d_transcoder, n_writes * d_model], or with `far_rank` [d_transcoder, d_model + n_far * far_rank] and
        W_far [n_far, far_rank, d_model] for all layers but the last (see `fast.products`),
        log_threshold [d_transcoder] (jumprelu only), W_skip [d_model, d_model] (`skip` only; x @ W_skip),
        b_dec [n_layers, d_model] for all layers, and where scores have a threshold at inference, score_threshold
        [n_layers], which is no parameter but a running mean.
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
        """W_enc ~ U(+-1/sqrt(d_transcoder)), W_dec ~ U(+-1/sqrt(n_layers * d_model)), biases and W_skip 0.

        W_far ~ U(+-sqrt(3 / far_rank)), so that the decoders it makes have W_dec's variance.

        Each rank draws the weights of all features, one tensor at a time, and keeps its own: the same seed gives
        the same CLT on any number of processes.
        """
        cfg: CrossLayerTranscoderConfig = self.transcoder_config
        kind = {"dtype": self.dtype, "device": self.device}

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **kind).uniform_(-bound, bound))

        def own(whole: nn.Parameter) -> nn.Parameter:
            return whole if n_own == n_features else nn.Parameter(whole.data[self.grid.own(n_features)].clone())

        def constant(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, **kind))

        layers, n_features, rank = range(cfg.n_layers), cfg.d_transcoder, self.cfg.far_rank
        n_own = self.n_own_features
        enc_bound, dec_bound = n_features**-0.5, (cfg.n_layers * cfg.d_model) ** -0.5
        n_far = [len(cfg.targets(s)) - 1 for s in layers]
        far_width = cfg.d_model if rank is None else rank
        self.W_enc = nn.ParameterList([own(uniform(enc_bound, n_features, cfg.d_model)) for _ in layers])
        self.b_enc = nn.ParameterList([constant(0.0, n_own) for _ in layers])
        widths = [cfg.d_model + n * far_width for n in n_far]
        self.W_dec = nn.ParameterList([own(uniform(dec_bound, n_features, width)) for width in widths])
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
        return self.cfg.transcoder_config(self.cfg.d_in, self.cfg.dtype)

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

    def full_decoders(self) -> list[Float[Tensor, "d_transcoder width"]]:
        """Each layer's decoder vectors side by side, [d_transcoder, n_writes * d_model]."""
        pairs = [(W, self.far(s)) for s, W in enumerate(self.W_dec)]
        return [W if far is None else full_decoder(W, far) for W, far in pairs]

    def norms(self) -> list[Float[Tensor, " d_transcoder"]]:
        """||W_dec,i|| of each layer's features, over all their decoder vectors."""
        pairs = [(W, self.far(s)) for s, W in enumerate(self.W_dec)]
        return [decoder_norms([W])[0] if far is None else far_norms(W, far) for W, far in pairs]

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

    def encode_layers(self, inputs: Sequence[Float[Tensor, "batch d_model"]]) -> list[LayerEncoding]:
        """`phi(x[s] @ W_enc[s].T + b_enc[s])` for each layer's (scaled) input."""
        hidden_pre = [
            torch.addmm(b_enc, x, W_enc.T) for x, W_enc, b_enc in zip(inputs, self.W_enc, self.b_enc, strict=True)
        ]
        acts = self._selected(hidden_pre) if self.cfg.selects else self._activated(hidden_pre)
        return [LayerEncoding(a, h) for a, h in zip(acts, hidden_pre, strict=True)]

    def _activated(self, hidden_pre: list[Tensor]) -> list[Tensor]:
        if self.cfg.activation == "relu":
            return [torch.relu(h) for h in hidden_pre]
        bandwidth, mode = self.cfg.jumprelu_bandwidth, self.cfg.straight_through
        return [jumprelu(h, t, bandwidth, mode) for h, t in zip(hidden_pre, self.thresholds(), strict=True)]

    def _selected(self, hidden_pre: list[Tensor]) -> list[Tensor]:
        scores = [h.detach() * norm.detach() for h, norm in zip(hidden_pre, self.norms(), strict=True)]
        if self.cfg.has_score_threshold and not self.selects_in_batch:
            kept = [s > t for s, t in zip(scores, self.score_threshold, strict=True)]
        else:
            kept = [s >= t for s, t in zip(scores, self.smallest_kept(scores, self.cfg.k), strict=True)]
        return [torch.relu(h) * keep for h, keep in zip(hidden_pre, kept, strict=True)]

    @property
    def selects_in_batch(self) -> bool:
        """Whether features compete with those of the batch and of other layers, or with a fixed threshold."""
        return self.training

    def smallest_kept(
        self, scores: Sequence[Float[Tensor, "batch d_transcoder"]], k: int
    ) -> list[Float[Tensor, "_ 1"]]:
        """The smallest score that is kept in each layer: of each token for topk, of the batch for batchtopk."""
        together = self.cfg.topk_across == "all_layers"
        groups = [list(scores)] if together else [[s] for s in scores]
        smallest = []
        for layer, group in enumerate(groups):
            n_kept = k * len(group)
            if self.cfg.activation == "topk":
                smallest.append(token_thresholds(group, n_kept, self.grid))
            else:
                guess = float(self.score_threshold[layer])
                n_tokens = len(group[0]) * self.grid.n_data_parallel
                smallest.append(batch_threshold(group, n_kept * n_tokens, guess, self.grid))
        return smallest * len(scores) if together else smallest

    def decode_layers(
        self,
        feature_acts: Sequence[Float[Tensor, "batch d_transcoder"]],
        inputs: Sequence[Float[Tensor, "batch d_model"]] | None = None,
    ) -> Float[Tensor, "batch n_layers d_model"]:
        """The (scaled) outputs of every layer: one matrix product a source, summed by target.

        Args:
            feature_acts: one tensor a layer.
            inputs: the layers' (scaled) inputs, which a skip connection needs.
        """
        cfg = self.transcoder_config
        written: list[list[Tensor]] = [[] for _ in range(cfg.n_layers)]
        for source, (acts, W_dec) in enumerate(zip(feature_acts, self.full_decoders(), strict=True)):
            slots = (acts @ W_dec).unflatten(-1, (-1, cfg.d_model))
            for target, slot in zip(cfg.targets(source), slots.unbind(dim=1), strict=True):
                written[target].append(slot)
        recons = self.grid.sum_over_features(torch.stack([_sum(slots) for slots in written], dim=1)) + self.b_dec
        if self.W_skip is None:
            return recons
        if inputs is None:
            raise ConfigError("This CLT has a skip connection, which reads the inputs: decode needs them.")
        return recons + torch.stack([x @ W_skip for x, W_skip in zip(inputs, self.W_skip, strict=True)], dim=1)

    def decode(self, feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch n_layers d_model"]:
        """`decode_layers` of activations flattened over layers, as SAELens keeps them.

        Raises:
            ConfigError: the CLT has a skip connection.
        """
        per_layer = feature_acts.unflatten(-1, (self.cfg.n_layers, self.n_own_features))
        return self.decode_layers(per_layer.unbind(dim=1))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


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
            quantile = (x @ clt.W_enc[layer][part].T).kthvalue(rank, dim=0).values
            clt.b_enc[layer][part] = threshold[part] - quantile


@torch.no_grad()
def init_decoder_biases(clt: TrainingCLT, outputs: Float[Tensor, "batch n_layers d_model"]) -> None:
    """Set b_dec to the mean of scaled outputs, which is the best that a CLT without features can write."""
    clt.b_dec.copy_(outputs.double().mean(dim=0))


THRESHOLD_RATE = 0.01
"""Weight of a step in the running mean of the smallest kept score."""


@dataclass(kw_only=True)
class InferenceCLTConfig(CLTShape, SAEConfig):
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
        _check(self, self)


@dataclass(kw_only=True)
class TrainingCLTConfig(CLTShape, TrainingSAEConfig):
    """SAELens's config of a CLT in training. d_in is d_model, d_sae is n_layers * d_transcoder."""

    apply_b_dec_to_input: bool = False
    """Always False: outputs are not inputs."""

    decoder_init_norm: float | None = None
    """Always None: the decoder starts uniform."""

    sparsity_loss: SparsityKind = "tanh"
    """Form of the sparsity loss; no part for topk and batchtopk."""

    sparsity_coefficient: float = 1.0
    """lambda at the end of training, or where the controller of `target_l0` begins."""

    sparsity_warm_up_steps: int = 0
    """Steps over which lambda rises linearly from 0, or the controller's L0 falls to its target."""

    target_l0: float | None = None
    """Active features per layer and token, mean over layers, that training is to reach."""

    tanh_scale: float = 4.0
    """c of the tanh sparsity loss."""

    dead_feature_coefficient: float = 3e-6
    """lambda_P."""

    k_start: int | None = None
    """k at the first step; `k` where left out."""

    k_anneal_steps: int = 0
    """Steps over which k falls linearly from `k_start`."""

    auxk_coefficient: float = 1 / 32
    """Weight of AuxK, for topk and batchtopk."""

    k_aux: int | None = None
    """Dead features of each layer that AuxK trains at a token; d_model / 2 where left out."""

    dead_feature_density: float = 1e-6
    """Share of tokens, over the dead-feature window, below which a feature counts as dead."""

    @classmethod
    def architecture(cls) -> str:
        """`ARCHITECTURE`."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, self)


def _check(shape: CLTShape, cfg: SAEConfig) -> None:
    shape.transcoder_config(cfg.d_in, cfg.dtype)
    n_features = shape.n_layers * shape.d_transcoder
    if cfg.d_sae != n_features:
        raise ConfigError(f"d_sae is {cfg.d_sae}: it must be n_layers * d_transcoder = {n_features}.")
    if cfg.normalize_activations != "none" or cfg.apply_b_dec_to_input:
        raise ConfigError(
            "A CLT is trained with normalize_activations='none' and apply_b_dec_to_input=False:"
            " each layer's inputs and outputs are scaled before they reach SAELens's trainer."
        )


class InferenceCLT(CLTLayers, SAE[InferenceCLTConfig]):
    """A trained CLT, on scaled inputs, as SAELens loads it. For everything else export a `CrossLayerTranscoder`."""

    def encode(self, x: Float[Tensor, "batch n_layers d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of scaled inputs, flattened over layers."""
        encodings = self.encode_layers(x.to(self.dtype).unbind(dim=1))
        return torch.cat([e.feature_acts for e in encodings], dim=1)

    @property
    def selects_in_batch(self) -> bool:
        """Never."""
        return False


class TrainingCLT(CLTLayers, TrainingSAE[TrainingCLTConfig]):
    """A CLT in training. Its input is [batch, 2, n_layers, d_model]: scaled inputs, then scaled outputs."""

    last_losses: dict[str, Tensor]
    """Terms of the last step's loss, without gradients."""

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

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """lambda and lambda_P for SAELens's schedulers, or the weight of AuxK."""
        if self.cfg.selects:
            return {"auxk": self.cfg.auxk_coefficient}
        return {
            "dead_feature": self.cfg.dead_feature_coefficient,
            "sparsity": TrainCoefficientConfig(self.cfg.sparsity_coefficient, self.cfg.sparsity_warm_up_steps),
        }

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "batch n_layers d_model"]
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
        """(feature_acts, hidden_pre) of scaled inputs, flattened over layers."""
        encodings = self.encode_layers(x.to(self.dtype).unbind(dim=1))
        feature_acts, hidden_pre = zip(*encodings, strict=True)
        return torch.cat(feature_acts, dim=1), torch.cat(hidden_pre, dim=1)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses and activations, all flattened over layers as SAELens's metrics expect.

        `sae_in` and `sae_out` of the result are the scaled outputs and their reconstruction,
        [batch, n_layers * d_model]; `feature_acts` and `hidden_pre` are [batch, n_layers * d_transcoder] and
        carry no gradient (the loss does).
        """
        step = self.step(step_input, Workspace())
        acts = torch.cat([f.dense() for f in step.features], dim=1)
        hidden_pre = torch.cat(step.hidden_pre, dim=1)
        return self.step_output(step, step_input, acts, hidden_pre)

    def step(self, step_input: TrainStepInput, workspace: Workspace) -> CLTStep:
        """One step's losses and activations, layer by layer. In training mode the running threshold follows."""
        step = clt_step(self, step_input, workspace)
        if self.cfg.has_score_threshold and self.training and step.smallest_kept is not None:
            rate = max(1 / (step_input.n_training_steps + 1), THRESHOLD_RATE)
            self.score_threshold.lerp_(step.smallest_kept.to(self.score_threshold.dtype), rate)
        self.last_losses = {name: value.detach() for name, value in step.losses.items()}
        return step

    def count_firing(self, step: CLTStep) -> Int[Tensor, " d_sae"]:
        """Tokens of a step at which each feature fires: of all layers, all ranks' features, all ranks' tokens."""
        own = torch.stack([features.fired for features in step.features])
        return self.grid.all_features(self.grid.add_over_data(own), dim=1).flatten()

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

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """Sparsity and dead-feature terms of flattened activations, times their coefficients. AuxK is the step's."""
        if self.cfg.selects:
            return {}
        cfg, coefficients = self.cfg, step_input.coefficients
        shape = (cfg.n_layers, self.n_own_features)
        acts, pre = (flat.unflatten(-1, shape).unbind(dim=1) for flat in (feature_acts, hidden_pre))
        norms, thresholds = self.norms(), self.thresholds()
        if cfg.sparsity_loss == "tanh":
            counts = [tanh_count(a, norm, cfg.tanh_scale) for a, norm in zip(acts, norms, strict=True)]
        else:
            gradient = (cfg.jumprelu_bandwidth, cfg.straight_through)
            counts = [step_function(h, t, *gradient).sum(dim=1) for h, t in zip(pre, thresholds, strict=True)]
        sparsity = sparsity_loss(torch.stack(counts).sum(dim=0), cfg.sparsity_loss, self.l0_target)
        losses = {"sparsity_loss": coefficients["sparsity"] * sparsity}
        if coefficients["dead_feature"] > 0:
            losses["dead_feature_loss"] = coefficients["dead_feature"] * dead_feature_loss(pre, thresholds, norms)
        return losses

    @property
    def l0_target(self) -> float | None:
        """`target_l0`, summed over layers."""
        return None if self.cfg.target_l0 is None else self.cfg.target_l0 * self.cfg.n_layers

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


def register() -> None:
    """Make SAELens know CLTs: its configs look their classes up by name. Doing it twice changes nothing."""
    if ARCHITECTURE not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class(ARCHITECTURE, InferenceCLT, InferenceCLTConfig)
    if ARCHITECTURE not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(ARCHITECTURE, TrainingCLT, TrainingCLTConfig)


register()
