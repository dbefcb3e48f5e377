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

from tl_clt.training.activations import StraightThrough, jumprelu
from tl_clt.training.sharding import SINGLE, ProcessGrid
from tl_clt.transcoder.activations import topk
from tl_clt.transcoder.config import Activation, CrossLayerTranscoderConfig

ARCHITECTURE = "cross_layer_transcoder"
"""Name of a CLT in SAELens's registries."""

SHARED_WEIGHTS = ("b_dec",)
"""Weights that belong to no feature: every rank has the whole of them. Of all others, dimension 0 is features."""


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
    """relu, jumprelu or topk."""

    k: int | None = None
    """Features kept per layer and token, for topk."""

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

    def transcoder_config(self, d_model: int, dtype: str) -> CrossLayerTranscoderConfig:
        """The config of the `CrossLayerTranscoder` that this one becomes.

        Raises:
            ConfigError: a value is out of range.
        """
        return CrossLayerTranscoderConfig(
            n_layers=self.n_layers,
            d_model=d_model,
            d_transcoder=self.d_transcoder,
            span=self.span,
            activation=self.activation,
            k=self.k,
            input_hook=self.input_hook,
            output_hook=self.output_hook,
            model_name=self.model_name,
            dtype=dtype,
            input_scale=None if self.input_scale is None else tuple(self.input_scale),
            output_scale=None if self.output_scale is None else tuple(self.output_scale),
        )


class CLTLayers:
    """Weights and passes of a CLT, mixed into SAELens's `SAE` and `TrainingSAE`.

    Weights, one tensor a source layer unless said otherwise:
        W_enc [d_transcoder, d_model], b_enc [d_transcoder], W_dec [d_transcoder, n_writes * d_model],
        log_threshold [d_transcoder] (jumprelu only), and b_dec [n_layers, d_model] for all layers.
    On a grid of processes, d_transcoder is the rank's share in all of them; `cfg` stays that of the whole CLT.
    """

    grid: ProcessGrid = SINGLE
    """The processes that the features are split among."""

    cfg: Any
    dtype: torch.dtype
    device: torch.device
    W_enc: Any
    b_enc: Any
    W_dec: Any
    b_dec: Any
    log_threshold: Any

    def initialize_weights(self) -> None:
        """W_enc ~ U(+-1/sqrt(d_transcoder)), W_dec ~ U(+-1/sqrt(n_layers * d_model)), biases 0.

        Each rank draws the weights of all features, one tensor at a time, and keeps its own: the same seed gives
        the same CLT on any number of processes.
        """
        cfg: CrossLayerTranscoderConfig = self.transcoder_config
        kind = {"dtype": self.dtype, "device": self.device}

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            whole = torch.empty(*shape, **kind).uniform_(-bound, bound)
            return nn.Parameter(whole if n_own == n_features else whole[own].clone())

        def constant(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, **kind))

        layers, n_features = range(cfg.n_layers), cfg.d_transcoder
        own, n_own = self.grid.own(n_features), self.n_own_features
        enc_bound, dec_bound = n_features**-0.5, (cfg.n_layers * cfg.d_model) ** -0.5
        self.W_enc = nn.ParameterList([uniform(enc_bound, n_features, cfg.d_model) for _ in layers])
        self.b_enc = nn.ParameterList([constant(0.0, n_own) for _ in layers])
        self.W_dec = nn.ParameterList(
            [uniform(dec_bound, n_features, len(cfg.targets(s)) * cfg.d_model) for s in layers]
        )
        self.b_dec = constant(0.0, cfg.n_layers, cfg.d_model)
        self.log_threshold = None
        if cfg.activation == "jumprelu":
            start = float(torch.tensor(self.cfg.jumprelu_init_threshold, dtype=torch.float64).log())
            self.log_threshold = nn.ParameterList([constant(start, n_own) for _ in layers])

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

    def thresholds(self) -> list[Float[Tensor, " d_transcoder"]]:
        """theta of each layer's features: 0 where phi has no threshold."""
        if self.log_threshold is None:
            return [torch.zeros_like(b) for b in self.b_enc]
        return [log.exp() for log in self.log_threshold]

    def encode_layers(
        self, inputs: Sequence[Float[Tensor, "batch d_model"]], thresholds: Sequence[Tensor]
    ) -> list[LayerEncoding]:
        """`phi(x[s] @ W_enc[s].T + b_enc[s])` for each layer's (scaled) input."""
        encodings = []
        for x, W_enc, b_enc, threshold in zip(inputs, self.W_enc, self.b_enc, thresholds, strict=True):
            hidden_pre = torch.addmm(b_enc, x, W_enc.T)
            encodings.append(LayerEncoding(self.activate(hidden_pre, threshold), hidden_pre))
        return encodings

    def activate(
        self, hidden_pre: Float[Tensor, "batch d_transcoder"], threshold: Float[Tensor, " d_transcoder"]
    ) -> Float[Tensor, "batch d_transcoder"]:
        """phi of one layer, with gradients."""
        if self.cfg.activation == "jumprelu":
            return jumprelu(hidden_pre, threshold, self.cfg.jumprelu_bandwidth, self.cfg.straight_through)
        if self.cfg.activation == "topk":
            return topk(hidden_pre, self.cfg.k)
        return torch.relu(hidden_pre)

    def decode_layers(
        self, feature_acts: Sequence[Float[Tensor, "batch d_transcoder"]]
    ) -> Float[Tensor, "batch n_layers d_model"]:
        """The (scaled) outputs of every layer: one matrix product a source, summed by target."""
        cfg = self.transcoder_config
        written: list[list[Tensor]] = [[] for _ in range(cfg.n_layers)]
        for source, (acts, W_dec) in enumerate(zip(feature_acts, self.W_dec, strict=True)):
            slots = (acts @ W_dec).unflatten(-1, (-1, cfg.d_model))
            for target, slot in zip(cfg.targets(source), slots.unbind(dim=1), strict=True):
                written[target].append(slot)
        return self.grid.sum_over_features(torch.stack([_sum(slots) for slots in written], dim=1)) + self.b_dec

    def decode(self, feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch n_layers d_model"]:
        """`decode_layers` of activations flattened over layers, as SAELens keeps them."""
        per_layer = feature_acts.unflatten(-1, (self.cfg.n_layers, self.n_own_features))
        return self.decode_layers(per_layer.unbind(dim=1))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
