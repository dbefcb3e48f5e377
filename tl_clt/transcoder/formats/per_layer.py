"""What layouts with one file a source layer share: each file's tensors under names of its maker's own, the
`config.yaml` beside them, and hooks by other libraries' names.

circuit-tracer reads `model_kind`, `model_name`, `feature_input_hook`, `feature_output_hook` and `scan` of
`config.yaml`. Under the key `tl_clt` stands our whole config (span, activation, scaling record), which it ignores, so
that nothing is lost on the way back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from tl_clt.errors import FormatError
from tl_clt.files import read_config
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderSource, Weights, read_decoders
from tl_clt.transcoder.tensor_files import TensorFile, open_tensors


class LayerNames(NamedTuple):
    """What a layout calls a layer's tensors; `{i}` stands for the layer's number."""

    W_enc: str
    b_enc: str
    b_dec: str
    threshold: str | None
    """None where the layout has no thresholds."""
    W_skip: str | None
    """None where the layout has no skip connection."""
    encoder_outputs_first: bool
    """The encoder is stored [d_transcoder, d_model]."""
    skip_outputs_first: bool
    """The skip connection is stored [out, in] and used as `x @ W_skip.T`."""
    W_dec: str = "W_dec"
    always_threshold: bool = False
    """JumpReLU, whatever the first file holds."""

    def of(self, layer: int) -> LayerNames:
        """The names of one layer."""
        return self._replace(**{k: v.format(i=layer) for k, v in self._asdict().items() if isinstance(v, str)})


def load_layers(
    files: Sequence[Path],
    names: Callable[[TensorFile], LayerNames],
    decoder: Callable[[int, CrossLayerTranscoderConfig], DecoderSource],
    config: Callable[..., CrossLayerTranscoderConfig],
    *,
    span: int,
    activation: str | None = None,
    k: int | None = None,
    device: torch.device,
    dtype: str | None,
    lazy_decoder: bool,
) -> Weights:
    """Read a CLT whose files hold a layer each.

    Args:
        files: each layer's file with its encoder.
        names: what an open file's tensors are called.
        decoder: where a source layer's decoder lies.
        config: the config, given what the weight files say (n_layers, d_model, d_transcoder, span, activation, k,
            skip, dtype).
        span: the layout's own; a config beside the files may say less.
        activation, k: what a config beside the files says of them; without, thresholds mean JumpReLU, none ReLU.
        device, dtype, lazy_decoder: as in `from_pretrained`.
    """
    with open_tensors(files[0]) as tensors:
        first = names(tensors).of(0)
        d_transcoder, d_model = (_length(tensors, name) for name in (first.b_enc, first.b_dec))
        has_threshold = first.threshold is not None and (first.always_threshold or first.threshold in tensors.keys)
        cfg = config(
            n_layers=len(files),
            d_model=d_model,
            d_transcoder=d_transcoder,
            span=span,
            activation=activation or ("jumprelu" if has_threshold else "relu"),
            k=k,
            skip=first.W_skip in tensors.keys,
            dtype=tensors.dtype(first.W_enc),
        )
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    decoders = read_decoders(
        [decoder(source, cfg) for source in range(cfg.n_layers)],
        [len(cfg.targets(source)) for source in range(cfg.n_layers)],
        d_transcoder,
        d_model,
        dtype=getattr(torch, cfg.dtype),
        device=device,
        lazy=lazy_decoder,
    )
    # All files before the first weight: nothing is made that they do not hold.
    for layer, path in enumerate(files):
        with open_tensors(path) as tensors:
            _check_layer(cfg, tensors, names(tensors).of(layer))
    weights = Weights.empty(cfg, decoders, device)
    for layer, path in enumerate(files):
        with open_tensors(path) as tensors:
            _read_layer(weights, layer, tensors, names(tensors).of(layer))
    return weights


def _length(tensors: TensorFile, name: str) -> int:
    shape = tensors.shape(name)
    if len(shape) != 1:
        raise FormatError(f"'{tensors.path}': {name} has shape {list(shape)}: a vector was expected.")
    return shape[0]


def _check_layer(cfg: CrossLayerTranscoderConfig, tensors: TensorFile, names: LayerNames) -> None:
    """Raise unless a file holds what its CLT has, in the right shape, and nothing that the CLT has not."""
    D, F = cfg.d_model, cfg.d_transcoder
    tensors.require_shape(names.W_enc, (F, D) if names.encoder_outputs_first else (D, F))
    tensors.require_shape(names.b_enc, (F,))
    tensors.require_shape(names.b_dec, (D,))
    if names.threshold is None and cfg.has_threshold:
        raise FormatError(f"'{tensors.path}' has no thresholds, but its CLT is {cfg.activation} by its config.")
    if names.threshold is not None and cfg.has_threshold:
        tensors.require_shape(names.threshold, (F,))
    elif names.threshold is not None:
        tensors.refuse([names.threshold])
    if names.W_skip is None and cfg.skip:
        raise FormatError(f"'{tensors.path}' has no skip connection, but other files of its CLT have one.")
    if names.W_skip is not None and cfg.skip:
        tensors.require_shape(names.W_skip, (D, D))
    elif names.W_skip is not None:
        tensors.refuse([names.W_skip])


@torch.no_grad()
def _read_layer(weights: Weights, layer: int, tensors: TensorFile, names: LayerNames) -> None:
    """Read a file that was checked."""
    whole = (slice(None),)
    W_enc = tensors.part(names.W_enc, whole)
    weights.W_enc[layer] = W_enc.T if names.encoder_outputs_first else W_enc
    weights.b_enc[layer] = tensors.part(names.b_enc, whole)
    weights.b_dec[layer] = tensors.part(names.b_dec, whole)
    if weights.threshold is not None and names.threshold is not None:
        weights.threshold[layer] = tensors.part(names.threshold, whole)
    if weights.W_skip is not None and names.W_skip is not None:
        W_skip = tensors.part(names.W_skip, whole)
        weights.W_skip[layer] = W_skip.T if names.skip_outputs_first else W_skip


CONFIG = "config.yaml"
OURS = "tl_clt"


def read_yaml_config(
    folder: Path,
    input_hook: str | None = None,
    output_hook: str = "hook_mlp_out",
    beside: Path | None = None,
    **from_files: Any,
) -> CrossLayerTranscoderConfig:
    """The config of a circuit-tracer folder.

    Args:
        folder: where `config.yaml` lies.
        input_hook, output_hook: what the layout reads and writes where no config says so; without an `input_hook` it
            is hook_resid_mid, and a warning says that this was assumed.
        beside: folder of the first layer's file, whose `config.json` may give hooks by their Hugging Face names
            (Gemma Scope 2).
        from_files: what the weight files say (n_layers, d_model, d_transcoder, span, activation, skip, dtype).
    """
    values = read_config(folder / CONFIG)
    ours = values.get(OURS) or {}
    if not isinstance(ours, dict):
        raise FormatError(f"'{folder / CONFIG}': {OURS} holds no mapping of names to values. Remove that key.")
    for key in ("n_layers", "d_model", "d_transcoder"):
        if ours.get(key, from_files[key]) != from_files[key]:
            raise FormatError(
                f"'{folder / CONFIG}' says {key} {ours[key]}, but the weight files have {from_files[key]}."
                " Files of two CLTs are mixed: copy or download it again."
            )
    makers = read_config(beside / "config.json") if beside is not None else {}
    for key in ("hf_hook_point_in", "hf_hook_point_out"):
        if key in makers:
            hook = hook_of_hf(str(makers[key]), f"{beside}/config.json")
            input_hook, output_hook = (hook, output_hook) if key.endswith("_in") else (input_hook, hook)
    lacking = [key for key in ("feature_input_hook", "feature_output_hook") if key not in values]
    if input_hook is None and lacking and not {"input_hook", "output_hook"} <= ours.keys():
        warnings.warn(
            f"'{folder / CONFIG}' does not say where the CLT reads and writes ({', '.join(lacking)}): hook_resid_mid"
            " and hook_mlp_out are assumed. Where its makers meant other places (often mlp.hook_in and mlp.hook_out),"
            " other features fire: state both in that file.",
            stacklevel=2,
        )
    input_hook = input_hook or "hook_resid_mid"
    stated = {
        "model_name": values.get("model_name", makers.get("model_name", "unknown")),
        "input_hook": values.get("feature_input_hook", input_hook),
        "output_hook": values.get("feature_output_hook", output_hook),
        "scan": values.get("scan"),
    }
    return CrossLayerTranscoderConfig.from_dict({**from_files, **stated, **ours})


def write_yaml_config(weights: Weights, folder: Path, model_kind: str) -> None:
    """Write `config.yaml`."""
    values = {
        "model_kind": model_kind,
        "model_name": weights.cfg.model_name,
        "feature_input_hook": weights.cfg.input_hook,
        "feature_output_hook": weights.cfg.output_hook,
        "scan": weights.cfg.scan or weights.cfg.model_name,
        OURS: {k: list(v) if isinstance(v, tuple) else v for k, v in weights.cfg.to_dict().items()},
    }
    (folder / CONFIG).write_text(yaml.safe_dump(values, sort_keys=False))


def check_activation(weights: Weights) -> None:
    """Raise unless the activation is one that circuit-tracer has (ReLU, or thresholds as JumpReLU)."""
    if weights.cfg.activation == "topk":
        raise FormatError(
            "circuit-tracer's layout has no topk: it would read this CLT as ReLU and trace other features."
            " Save it with layout='native'."
        )


HF_HOOKS = {
    "mlp.input": "mlp.hook_in",
    "mlp.output": "mlp.hook_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""A place within a layer of a Hugging Face model, and what TransformerLens calls it. Gemma's norm before the MLP gives
the MLP its input; its norm behind the MLP gives the residual stream what it gets."""


def hook_of_hf(point: str, where: str) -> str:
    """The hook for a place such as `model.layers.3.pre_feedforward_layernorm.output`.

    Raises:
        FormatError: the place is not one of those in `HF_HOOKS`.
    """
    within = re.sub(r"^(model\.)?(language_model\.)?(layers\.(\d+|\{[a-z]*\})\.)?", "", point)
    if within not in HF_HOOKS:
        raise FormatError(
            f"'{where}' names a place '{point}', which is none of {', '.join(HF_HOOKS)} of a layer. This package does"
            " not know what hook it is; convert the CLT with the hook's name in a config.yaml (feature_input_hook)."
        )
    return HF_HOOKS[within]


def hook_within_block(name: str) -> str:
    """`blocks.3.hook_resid_mid` without its block."""
    return re.sub(r"^blocks\.\d+\.", "", name)


def numbered_files(folder: Path, prefix: str) -> list[Path]:
    """`{prefix}{i}.safetensors` for i = 0, 1, ... without a gap."""
    names = (path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.safetensors"))
    found = sorted({int(name) for name in names if name.isdecimal()})
    files = [folder / f"{prefix}{i}.safetensors" for i in range(len(found))]
    missing = next((files[i] for i, number in enumerate(found) if i != number), None)
    if missing is not None or not files:
        lacks = (missing or folder / f"{prefix}0.safetensors").name
        raise FormatError(f"'{folder}' lacks {lacks}. Copy or download the CLT again, whole.")
    return files
