"""llamascopium's CLTs, for reading: `config.json` (sae_type clt) and `sae_weights.safetensors`.

W_E [n_layers, d_model, d_transcoder], b_E [n_layers, d_transcoder], W_D.{t} [t + 1, d_transcoder, d_model] (decoders
by the layer they write to), b_D.{t} [d_model], and for JumpReLU activation_function.log_jumprelu_threshold [n_layers,
d_transcoder]. With `sparsity_include_decoder_norm` a feature is compared with its threshold after its pre-activation is
multiplied by n, the root of the summed squares of all it writes, which is a threshold of exp(log threshold) / n.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tl_clt.errors import FormatError
from tl_clt.files import read_config
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecodersByTarget, read_decoders
from tl_clt.transcoder.formats.per_layer import hook_within_block
from tl_clt.transcoder.tensor_files import TensorFile, open_tensors
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
THRESHOLD = "activation_function.log_jumprelu_threshold"
ACTIVATIONS = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return (folder / WEIGHTS).is_file() and read_config(folder / CONFIG).get("sae_type") == "clt"


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a CLT from this layout."""
    values, path = read_config(folder / CONFIG), folder / WEIGHTS
    with_norm = values.get("sparsity_include_decoder_norm", True)
    _check(values, with_norm, folder / CONFIG)
    with open_tensors(path) as tensors:
        shape = tensors.shape("W_E")
        if len(shape) != 3:
            raise FormatError(f"'{path}': W_E has shape {list(shape)}: [n_layers, d_model, d_transcoder] was expected.")
        n_layers, d_model, d_transcoder = shape
        cfg = CrossLayerTranscoderConfig(
            n_layers=n_layers,
            d_model=d_model,
            d_transcoder=d_transcoder,
            activation=ACTIVATIONS[values["act_fn"]],  # type: ignore[arg-type]
            k=values.get("top_k") if values["act_fn"] == "topk" else None,
            input_hook=_hook(values, "hook_points_in", n_layers, folder / CONFIG),
            output_hook=_hook(values, "hook_points_out", n_layers, folder / CONFIG),
            dtype=tensors.dtype("W_E"),
        )
        # Before anything of a stated size is made.
        tensors.require_shape("W_E", shape)
        tensors.require_shape("b_E", (n_layers, d_transcoder))
        for t in range(n_layers):
            tensors.require_shape(f"b_D.{t}", (d_model,))
        if cfg.has_threshold:
            tensors.require_shape(THRESHOLD, (n_layers, d_transcoder))
        else:
            tensors.refuse([THRESHOLD])
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    decoders = read_decoders(
        [
            DecodersByTarget(path, tuple(f"W_D.{t}" for t in cfg.targets(s)), tuple(t + 1 for t in cfg.targets(s)), s)
            for s in range(n_layers)
        ],
        [len(cfg.targets(s)) for s in range(n_layers)],
        d_transcoder,
        d_model,
        dtype=getattr(torch, cfg.dtype),
        device=device,
        lazy=lazy_decoder,
    )
    clt = CrossLayerTranscoder(cfg, decoders).to(device)
    with open_tensors(path) as tensors, torch.no_grad():
        clt.W_enc.copy_(tensors.tensor("W_E", shape))
        clt.b_enc.copy_(tensors.tensor("b_E", (n_layers, d_transcoder)))
        for t in range(n_layers):
            clt.b_dec[t] = tensors.tensor(f"b_D.{t}", (d_model,))
        if clt.threshold is not None:
            threshold = tensors.tensor(THRESHOLD, (n_layers, d_transcoder)).double().exp()
            for s in clt.layers:
                norm = _decoder_norm(tensors, s, n_layers) if with_norm else torch.ones(d_transcoder).double()
                clt.threshold[s] = threshold[s] / norm
    return clt


def _decoder_norm(tensors: TensorFile, source: int, n_layers: int) -> torch.Tensor:
    """Norm [d_transcoder] of all that each feature of a layer writes, taken together, one target at a time."""
    squares: list[torch.Tensor] = []
    for target in range(source, n_layers):
        squares.append(tensors.part(f"W_D.{target}", (source,)).double().square().sum(-1))
    return torch.stack(squares).sum(0).sqrt()


def _check(values: dict[str, Any], with_norm: Any, path: Path) -> None:
    act_fn = values.get("act_fn")
    if not isinstance(act_fn, str) or act_fn not in ACTIVATIONS:
        raise FormatError(f"'{path}': act_fn {act_fn!r} is not supported; {', '.join(ACTIVATIONS)} are.")
    if act_fn == "topk" and with_norm:
        raise FormatError(
            f"'{path}': topk ranks features by activation times decoder norm here (sparsity_include_decoder_norm),"
            " which this package's topk does not. Convert it to JumpReLU in llamascopium."
        )
    scaling = values.get("norm_activation", "inference")
    if scaling != "inference":
        raise FormatError(
            f"'{path}': norm_activation is {scaling!r}: the scale of inputs and outputs is not in the weights. Fold it"
            " in with llamascopium (its config then says inference) and load that."
        )


def _hook(values: dict[str, Any], key: str, n_layers: int, path: Path) -> str:
    names = values.get(key)
    if not isinstance(names, list) or len(names) != n_layers:
        raise FormatError(f"'{path}': {key} must name a hook for each of {n_layers} layers.")
    if any(not str(name).startswith(f"blocks.{t}.") for t, name in enumerate(names)):
        raise FormatError(f"'{path}': {key} must name layer t's hook at place t; it has {names}.")
    within = {hook_within_block(str(name)) for name in names}
    if len(within) > 1:
        raise FormatError(f"'{path}': {key} names several places in a layer ({sorted(within)}): one place only.")
    return within.pop()
