"""What a cross-layer transcoder is, in plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from tl_clt.arguments import DTYPES, as_number, as_several, as_switch, as_whole, shown
from tl_clt.errors import ConfigError, nearest

Activation = Literal["relu", "jumprelu", "topk", "batchtopk"]
KINDS: dict[str, type] = {
    **dict.fromkeys(("n_layers", "d_model", "d_transcoder", "span", "k"), int),
    **dict.fromkeys(("activation", "input_hook", "output_hook", "model_name", "dtype", "scan"), str),
    **dict.fromkeys(("input_scale", "output_scale"), tuple),
    "skip": bool,
}
"""What type each value has: files can hold anything."""
MAY_BE_NONE = ("span", "k", "scan", "input_scale", "output_scale")


@dataclass(frozen=True, kw_only=True)
class CrossLayerTranscoderConfig:
    """Shape, activation and hooks of a `CrossLayerTranscoder`. Checked on construction.

    Raises:
        ConfigError: a value is out of range; the message names the field and the mend.
    """

    n_layers: int
    """Layers of the model; the CLT reads and writes at every one."""

    d_model: int
    """Width of the residual stream."""

    d_transcoder: int
    """Features per layer (SAELens: `d_sae`)."""

    span: int | None = None
    """Layers a feature writes to, its own included: n_layers is a CLT, 1 a set of per-layer transcoders.
    Left out, it is n_layers; after construction it is always a number."""

    activation: Activation = "jumprelu"
    """relu, jumprelu (strict `>` against a threshold per feature), topk (k per layer and token), or
    batchtopk (a fixed threshold at inference, as jumprelu)."""

    k: int | None = None
    """Features kept per layer and token; for topk and batchtopk only."""

    skip: bool = False
    """Whether each layer adds a linear map of its own input, `x[t] @ W_skip[t]`."""

    input_hook: str = "hook_resid_mid"
    """Hook that features read, within a block: `hook_resid_mid` (before the norm), `hook_resid_pre` (parallel blocks),
    `ln2.hook_normalized` (before the norm's gain and bias) or `mlp.hook_in` (after both: what the MLP is given)."""

    output_hook: str = "hook_mlp_out"
    """Hook that features write, within a block: `hook_mlp_out` (what the residual stream gets) or `mlp.hook_out` (what
    the MLP returns, before a norm behind it)."""

    model_name: str = "unknown"
    """The model that it was trained on."""

    dtype: str = "float32"
    """Number type of the weights."""

    input_scale: tuple[float, ...] | None = None
    """Record of the factor that inputs of each layer had in training. Already folded into the weights."""

    output_scale: tuple[float, ...] | None = None
    """Record of the factor that outputs of each layer had in training. Already folded into the weights."""

    scan: str | None = None
    """circuit-tracer's identifier of a feature database, kept for round trips."""

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if value is not None or name not in MAY_BE_NONE:
                object.__setattr__(self, name, _plain(name, value, kind))
        for name in ("n_layers", "d_model", "d_transcoder"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: give at least 1.")
        if self.span is None:
            object.__setattr__(self, "span", self.n_layers)
        _require(
            1 <= self.n_writes_at_most <= self.n_layers,
            f"span is {self.span} for {self.n_layers} layers: give 1 (PLT) to {self.n_layers} (CLT).",
        )
        _require(
            self.activation in get_args(Activation),
            f"activation is {self.activation!r}: give one of {', '.join(get_args(Activation))}.",
        )
        takes_k = self.activation in ("topk", "batchtopk")
        _require(
            (self.k is not None) == takes_k,
            f"k is {self.k} with activation {self.activation!r}: topk and batchtopk need k, others take none.",
        )
        _require(
            self.k is None or 1 <= self.k <= self.d_transcoder,
            f"k is {self.k} for {self.d_transcoder} features per layer: give 1 to {self.d_transcoder}.",
        )
        _require(self.dtype in DTYPES, f"dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}.")
        for name in ("input_scale", "output_scale"):
            scale = getattr(self, name)
            _require(
                scale is None or len(scale) == self.n_layers,
                f"{name} has {len(scale or ())} factors for {self.n_layers} layers: give one a layer.",
            )
            _require(
                all(isinstance(factor, int | float) for factor in scale or ()),
                f"{name} is {scale}: give a number for each layer.",
            )

    @property
    def n_writes_at_most(self) -> int:
        """`span` as the number that it is after construction."""
        assert self.span is not None
        return self.span

    @property
    def has_threshold(self) -> bool:
        """Whether the activation compares with a threshold per feature."""
        return self.activation in ("jumprelu", "batchtopk")

    def targets(self, source: int) -> range:
        """Layers that features of layer `source` write to: source <= target < source + span."""
        return range(source, min(source + self.n_writes_at_most, self.n_layers))

    def sources(self, target: int) -> range:
        """Layers whose features write to layer `target`: target - span < source <= target."""
        return range(max(0, target - self.n_writes_at_most + 1), target + 1)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight but the decoders, of those that a CLT of this config has."""
        L, D, F = self.n_layers, self.d_model, self.d_transcoder
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (L, D, F), "b_enc": (L, F), "b_dec": (L, D)}
        shapes |= {"threshold": (L, F)} if self.has_threshold else {}
        return shapes | ({"W_skip": (L, D, D)} if self.skip else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CrossLayerTranscoderConfig:
        """The config of `to_dict`'s values.

        Raises:
            ConfigError: a key is unknown or a required one is missing.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                _require(False, f"'{key}' is no key of CrossLayerTranscoderConfig.{nearest(str(key), known)}")
        for key in ("n_layers", "d_model", "d_transcoder"):
            _require(
                key in values,
                f"'{key}' is missing from the CLT's config: it needs n_layers, d_model and d_transcoder.",
            )
        as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**as_tuples)


def _plain(name: str, value: object, kind: type) -> Any:
    """A value of one of a config's types, as a plain one of Python's."""
    label = f"CrossLayerTranscoderConfig: {name}"
    if kind is int:
        return as_whole(label, value)
    if kind is bool:
        return as_switch(label, value)
    if kind is tuple:
        factors = as_several(label, value, "a factor for each layer")
        return tuple(float(as_number(f"{label}[{i}]", factor)) for i, factor in enumerate(factors))
    _require(isinstance(value, str), f"{name} is {shown(value)}: give text.")
    return value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(f"CrossLayerTranscoderConfig: {message}")
