"""The cross-layer transcoder: features that read one layer and write to that layer and later ones.

    feature_acts[s] = phi(x[s] @ W_enc[s] + b_enc[s])
    recons[t]       = sum_{t-span < s <= t} feature_acts[s] @ W_dec[s -> t] + b_dec[t] (+ x[t] @ W_skip[t])

Source: Ameisen et al. 2025, Methods, "From Transcoders to the Replacement Model".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor, nn

from tl_clt.arguments import as_device, as_dtype, as_features, as_path, as_switch, as_whole, shown
from tl_clt.errors import CLTMismatch, ConfigError, FormatError
from tl_clt.report import as_html
from tl_clt.shapes import FeatureActs, LayerInputs, LayerOutputs
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import Decoders, DenseDecoders, Weights
from tl_clt.transcoder.formats import load, save


class Encoding(NamedTuple):
    """One layer's features on some tokens."""

    feature_acts: Float[Tensor, "*batch d_transcoder"]
    """After phi: sparse, not negative."""

    hidden_pre: Float[Tensor, "*batch d_transcoder"]
    """Before phi."""


class CrossLayerTranscoder(nn.Module):
    """A CLT (`span = n_layers`), a set of per-layer transcoders (`span = 1`), or anything between.

    Weights:
        W_enc [n_layers, d_model, d_transcoder], b_enc [n_layers, d_transcoder], b_dec [n_layers, d_model],
        threshold [n_layers, d_transcoder] or None, W_skip [n_layers, d_model, d_model] or None, and
        W_dec[source] [d_transcoder, n_writes, d_model], slot j of which writes layer source + j.
    """

    def __init__(self, cfg: CrossLayerTranscoderConfig, decoders: Decoders | None = None) -> None:
        """Fresh weights: W_enc ~ U(+-1/sqrt(d_transcoder)), W_dec ~ U(+-1/sqrt(n_layers * d_model)), else 0.

        Args:
            cfg: shape, activation and hooks.
            decoders: decoder weights to use in place of fresh ones (as the file formats do).
        """
        super().__init__()
        if not isinstance(cfg, CrossLayerTranscoderConfig):
            raise ConfigError(f"cfg is {shown(cfg)}: give a CrossLayerTranscoderConfig.")
        if decoders is not None and not isinstance(decoders, Decoders):
            raise ConfigError(f"decoders is {shown(decoders)}: give DenseDecoders or LazyDecoders, or leave it out.")
        self.cfg = cfg
        self._fingerprint: tuple[tuple, str] | None = None
        dtype = getattr(torch, cfg.dtype)
        n_layers, d_model, d_transcoder = cfg.n_layers, cfg.d_model, cfg.d_transcoder

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(n_layers, *shape, dtype=dtype))

        # Weights from files come next: filling what they replace would take as long as reading them.
        self.W_enc = nn.Parameter(torch.empty(n_layers, d_model, d_transcoder, dtype=dtype))
        self.b_enc = zeros(d_transcoder)
        self.b_dec = zeros(d_model)
        self.threshold = zeros(d_transcoder) if cfg.has_threshold else None
        self.W_skip = zeros(d_model, d_model) if cfg.skip else None
        if decoders is None:
            nn.init.uniform_(self.W_enc, -(d_transcoder**-0.5), d_transcoder**-0.5)
            bound = (n_layers * d_model) ** -0.5
            shapes = [(d_transcoder, len(cfg.targets(s)), d_model) for s in range(n_layers)]
            decoders = DenseDecoders([torch.empty(*s, dtype=dtype).uniform_(-bound, bound) for s in shapes])
        self.W_dec = decoders

    # -- reading ---------------------------------------------------------------------------------------

    def encode(self, x: LayerInputs) -> FeatureActs:
        """Feature activations of every layer from every layer's input."""
        self._require_shape("x", x, self.cfg.d_model)
        return torch.stack([self.encode_layer(x[..., s, :], s).feature_acts for s in self.layers], dim=-2)

    def encode_layer(self, x: Float[Tensor, "*batch d_model"], layer: int) -> Encoding:
        """One layer's features from that layer's input, with their pre-activations."""
        hidden_pre = self.hidden_pre_layer(x, layer)
        return Encoding(self.activate(hidden_pre, layer), hidden_pre)

    def hidden_pre(self, x: LayerInputs) -> FeatureActs:
        """Pre-activations of every layer's features from every layer's input."""
        self._require_shape("x", x, self.cfg.d_model)
        return torch.stack([self.hidden_pre_layer(x[..., s, :], s) for s in self.layers], dim=-2)

    def hidden_pre_layer(self, x: Float[Tensor, "*batch d_model"], layer: int) -> Float[Tensor, "*batch d_transcoder"]:
        """Pre-activations of one layer's features from that layer's input."""
        return x @ self.W_enc[layer] + self.b_enc[layer]

    def activate(
        self, hidden_pre: Float[Tensor, "*batch d_transcoder"], layer: int
    ) -> Float[Tensor, "*batch d_transcoder"]:
        """phi of one layer."""
        if self.threshold is not None:
            return jumprelu(hidden_pre, self.threshold[layer])
        if self.cfg.activation == "topk":
            assert self.cfg.k is not None
            return topk(hidden_pre, self.cfg.k)
        return torch.relu(hidden_pre)

    # -- writing ---------------------------------------------------------------------------------------

    def decode(self, feature_acts: FeatureActs, x: LayerInputs | None = None) -> LayerOutputs:
        """MLP outputs of every layer. `x`, the layers' inputs, is needed where there is a skip connection."""
        self._require_input(x)
        self._require_shape("feature_acts", feature_acts, self.cfg.d_transcoder)
        written: dict[int, Tensor] = {}
        recons = []
        for layer in self.layers:
            self.add_written(written, feature_acts[..., layer, :], layer)
            recons.append(self.recons_of(written, layer, None if x is None else x[..., layer, :]))
        return torch.stack(recons, dim=-2)

    def add_written(
        self,
        written: dict[int, Tensor],
        feature_acts: Float[Tensor, "*batch d_transcoder"],
        source: int,
        *,
        active_only: bool = False,
    ) -> None:
        """Add what one layer's features write to the sums, by target layer, of what layers before it have written.

        With `recons_of`, this is the loop over layers of `decode`, for passes that come to one layer after another.

        Args:
            written: sums [*batch, d_model] by target layer; layers that nothing writes to have no entry.
            feature_acts, source: activations (or changes of them) of one layer.
            active_only: as for `decode_source`.
        """
        by_target = self.decode_source(feature_acts, source, active_only=active_only)
        for slot, target in enumerate(self.cfg.targets(source)):
            before = written.get(target)
            written[target] = by_target[..., slot, :] if before is None else before + by_target[..., slot, :]

    def recons_of(
        self, written: dict[int, Tensor], layer: int, x: Float[Tensor, "*batch d_model"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of one layer's output, whose sum is taken out of `written`: all layers up to it must have
        been added. `x`, the layer's input, is needed where there is a skip connection."""
        recons = written.pop(layer) + self.b_dec[layer]
        if self.W_skip is None:
            return recons
        assert x is not None, "a skip connection needs the layer's input"
        return recons + self.skip(x, layer)

    def decode_source(
        self, feature_acts: Float[Tensor, "*batch d_transcoder"], source: int, *, active_only: bool = False
    ) -> Float[Tensor, "*batch n_writes d_model"]:
        """What one layer's features write to each of their target layers, as one matrix product.

        Args:
            feature_acts: activations, or changes of them.
            source: the layer.
            active_only: take decoder vectors of features with an entry other than 0 alone, as is always done where
                decoders lie on disk. Worth it where few have.
        """
        if isinstance(self.W_dec, DenseDecoders) and not active_only:
            W_dec = self.W_dec[source]
        else:
            active = torch.nonzero(feature_acts.detach().reshape(-1, self.cfg.d_transcoder).any(dim=0)).flatten()
            feature_acts = feature_acts[..., active]
            W_dec = self.W_dec.rows(source, active)
        written = feature_acts @ W_dec.flatten(start_dim=1)
        return written.unflatten(-1, (len(self.cfg.targets(source)), self.cfg.d_model))

    def skip(self, x: Float[Tensor, "*batch d_model"], layer: int) -> Float[Tensor, "*batch d_model"]:
        """The linear skip connection of one layer."""
        assert self.W_skip is not None, "this CLT has no skip connection"
        return x @ self.W_skip[layer]

    def forward(self, x: LayerInputs) -> LayerOutputs:
        """`decode(encode(x), x)`."""
        return self.decode(self.encode(x), x)

    def decoder_rows(
        self, source: int, features: Int[Tensor, " n"] | Sequence[int]
    ) -> Float[Tensor, "n n_writes d_model"]:
        """Decoder vectors of some features of a layer, one for each layer they write to."""
        source = as_whole("source", source, 0, self.cfg.n_layers - 1, why="the layers")
        return self.W_dec.rows(source, as_features(features, self.cfg.d_transcoder).to(self.W_enc.device))

    @property
    def layers(self) -> range:
        """0 to n_layers - 1."""
        return range(self.cfg.n_layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrossLayerTranscoder:
        """Moved or cast (`to`, `half`): the configuration tells the number type that the weights then have."""
        super()._apply(fn, recurse)
        dtype = str(self.W_enc.dtype).removeprefix("torch.")
        if dtype != self.cfg.dtype:
            self.cfg = replace(self.cfg, dtype=dtype)
        return self

    def __repr__(self) -> str:
        cfg = self.cfg
        kind = {1: "PLTs", cfg.n_layers: "CLT"}.get(cfg.n_writes_at_most, f"span {cfg.span}")
        k = "" if cfg.k is None else f" (k {cfg.k})"
        return (
            f"{type(self).__name__}({kind} of {cfg.model_name}: {cfg.n_layers} layers x {cfg.d_transcoder} features,"
            f" d_model {cfg.d_model}, {cfg.activation}{k}, {cfg.input_hook} -> {cfg.output_hook}, {cfg.dtype})"
        )

    def _repr_html_(self) -> str:
        values = {name: str(value) for name, value in self.cfg.to_dict().items() if value is not None}
        return as_html(repr(self), {"config": DataFrame({"field": list(values), "value": list(values.values())})})

    def _require_input(self, x: Tensor | None) -> None:
        if self.W_skip is not None and x is None:
            raise ConfigError("This CLT has a skip connection: call decode(feature_acts, x) with the inputs x.")
        if x is not None:
            self._require_shape("x", x, self.cfg.d_model)

    def _require_shape(self, name: str, values: Tensor, width: int) -> None:
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise CLTMismatch(f"{name} is {shown(values)}: give a tensor of {self.W_enc.dtype}.")
        if values.shape[-2:] != (self.cfg.n_layers, width):
            raise CLTMismatch(
                f"{name} has shape {list(values.shape)}, but this CLT takes [..., {self.cfg.n_layers}, {width}]"
                f" (layers, then {'d_model' if name == 'x' else 'd_transcoder'})."
            )
        # Within autocast, products of different number types are what is asked for.
        W_enc, alike = self.W_enc, values.dtype == self.W_enc.dtype or torch.is_autocast_enabled(values.device.type)
        if values.device != W_enc.device or not alike:
            raise CLTMismatch(
                f"{name} has {values.dtype} on {values.device}, but this CLT has {W_enc.dtype} on {W_enc.device}: give"
                f" {name}.to({W_enc.dtype}).to('{W_enc.device}')."
            )

    @torch.no_grad()
    def fingerprint(self) -> str:
        """sha256 of what the CLT computes with: its shape, activation and hooks, and its weights as float32.

        Equal on every device, lazily loaded or not, and in float64 as in the float32 that it was loaded from. Of
        decoders, three features a layer stand for all, so that nothing large is read from disk. It is kept until a
        weight changes in place or is another tensor.
        """
        cfg, parameters = self.cfg, list(self.parameters())
        # Tensors made in inference mode do not tell how often they were changed.
        counted = not any(weight.is_inference() for weight in parameters)
        state = tuple((id(weight), weight.data_ptr(), weight._version) for weight in parameters) if counted else None
        if state is not None and self._fingerprint is not None and self._fingerprint[0] == state:
            return self._fingerprint[1]
        shape = [cfg.n_layers, cfg.d_model, cfg.d_transcoder, cfg.span, cfg.activation, cfg.k]
        digest = hashlib.sha256(json.dumps([*shape, cfg.input_hook, cfg.output_hook]).encode())
        three_features = sorted({0, cfg.d_transcoder // 2, cfg.d_transcoder - 1})
        weights = [getattr(self, name) for name in sorted(cfg.weight_shapes)]
        for weight in [*weights, *(self.decoder_rows(s, three_features) for s in self.layers)]:
            if weight is not None:
                values = weight.detach().to("cpu", torch.float32).contiguous().flatten()
                digest.update(values.view(torch.uint8).numpy().data)
        self._fingerprint = None if state is None else (state, digest.hexdigest())
        return digest.hexdigest()

    # -- files -----------------------------------------------------------------------------------------

    @property
    def weights(self) -> Weights:
        """All weights, as files hold them: these very tensors."""
        return Weights(cfg=self.cfg, W_dec=self.W_dec, **{name: getattr(self, name) for name in self.cfg.weight_shapes})

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_repo: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        lazy_decoder: bool = False,
    ) -> CrossLayerTranscoder:
        """Load a CLT; the layout is recognised by what the folder holds.

        Args:
            folder_or_hub_repo: a folder in the native layout or in a public one (circuit-tracer's CLTs and PLT sets,
                Gemma Scope 1 and 2, sparsify's, llamascopium's), a bundled organism ("atlas"), a name of
                `tl_clt.public_transcoders()`, or a hub repository with one of these: `owner/repo`,
                `owner/repo/sub/folder`, either with `@revision`. A folder here goes before a name.
            device: where the weights go.
            dtype: number type of the weights; that of the files where left out.
            lazy_decoder: leave decoders on disk and read only the rows asked for.

        Raises:
            ConfigError: device, dtype or lazy_decoder is not one.
            FormatError: the folder is in no known layout, or a file is truncated or of the wrong shape.
        """
        as_path("folder_or_hub_repo", folder_or_hub_repo, FormatError)
        weights = load(
            folder_or_hub_repo,
            device=as_device("device", device),
            dtype=None if dtype is None else as_dtype("dtype", dtype),
            lazy_decoder=as_switch("lazy_decoder", lazy_decoder),
        )
        clt = cls(weights.cfg, weights.W_dec)
        for name in weights.cfg.weight_shapes:
            setattr(clt, name, nn.Parameter(getattr(weights, name)))
        return clt

    def save_pretrained(self, folder: str | Path, layout: Literal["native", "circuit-tracer"] = "native") -> Path:
        """Write the CLT to a new or empty folder, all or nothing.

        Raises:
            OutputNotEmpty: the folder holds something already, or is a file.
            NotWritten: the disk is full, for example; nothing is left.
            FormatError: the layout cannot express this CLT (for example topk in circuit-tracer's).
        """
        return save(self.weights, as_path("folder", folder), layout)


class ExplainedVariance(NamedTuple):
    """The one measure of this name, in training's metrics and in reports on held-out text."""

    per_layer: list[float]
    """Of each layer: 1 - sum ||out - recons||^2 / sum ||out - mean out||^2, sums and mean over tokens."""

    mean: float
    """Mean over layers, so that each counts alike however large its outputs are."""


def explained_variance(
    error_squared: Float[Tensor, " n_layers"],
    variance: Float[Tensor, " n_layers"],
    out_squared: Float[Tensor, " n_layers"],
) -> ExplainedVariance:
    """How much of what outputs vary by a reconstruction accounts for.

    Args:
        error_squared: sum over tokens of ||out - recons||^2.
        variance: sum of ||out - mean out||^2.
        out_squared: sum of ||out||^2. Where outputs do not vary, as on one token, `variance` is what rounding leaves of
            this, and all error counts as unexplained.
    """
    floor = (torch.finfo(torch.float64).eps * out_squared).clamp_min(1e-30)
    explained = 1 - error_squared / variance.maximum(floor)
    return ExplainedVariance(explained.tolist(), float(explained.mean()))


def jumprelu(
    hidden_pre: Float[Tensor, "*batch d_transcoder"], threshold: Float[Tensor, " d_transcoder"]
) -> Float[Tensor, "*batch d_transcoder"]:
    """`hidden_pre` where it is strictly above its feature's threshold, else 0."""
    return hidden_pre * (hidden_pre > threshold)


def topk(hidden_pre: Float[Tensor, "*batch d_transcoder"], k: int) -> Float[Tensor, "*batch d_transcoder"]:
    """The k largest pre-activations of each token that are positive, else 0."""
    kept = torch.topk(hidden_pre, k, dim=-1)
    return torch.zeros_like(hidden_pre).scatter(-1, kept.indices, torch.relu(kept.values))
