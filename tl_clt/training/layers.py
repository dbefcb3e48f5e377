"""The weights of a CLT as SAELens modules hold them, and the two passes over them.

Each source layer's weights are parameters of their own: a slice of one stacked parameter would fill a gradient of the
whole stack with zeros for every slice taken. A layer's decoder vectors lie side by side, so that what it writes to
all its targets is one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_clt.errors import ConfigError
from tl_clt.training.activations import StraightThrough, jumprelu
from tl_clt.training.losses import decoder_norms
from tl_clt.training.low_rank import far_norms, full_decoder
from tl_clt.training.selection import Across, batch_threshold, token_thresholds
from tl_clt.training.sharding import SINGLE, ProcessGrid
from tl_clt.transcoder.config import Activation, CrossLayerTranscoderConfig

ARCHITECTURE = "cross_layer_transcoder"
"""Name of a CLT in SAELens's registries."""

SHARED_WEIGHTS = ("W_far", "W_skip", "b_dec", "score_threshold")
"""Weights that belong to no feature: every rank has the whole of them. Of all others, dimension 0 is features."""


SMALLEST_NORM = 1e-12
"""Norms below count as this where a threshold is divided by them: such a feature writes nothing and never fires."""


def is_shared(name: str) -> bool:
    """Whether every rank has the whole of a weight ("b_dec", "W_far.0")."""
    return name.split(".")[0] in SHARED_WEIGHTS


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
        W_far [n_far, far_rank, d_model] for all layers but the last (see `low_rank`),
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
