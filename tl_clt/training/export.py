"""From a CLT in training, on scaled activations, to a `CrossLayerTranscoder` on raw ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tl_clt.training.training_clt import InferenceCLT, TrainingCLT
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.decoders import DenseDecoders


@torch.no_grad()
def export(clt: TrainingCLT | InferenceCLT, dtype: str | None = None) -> CrossLayerTranscoder:
    """A `CrossLayerTranscoder` with the scaling of training folded into its weights, exactly.

    With x_scaled = s_in * x and y_scaled = s_out * y:
        W_enc[s].T * s_in[s],   W_dec[s -> t] / s_out[t],   b_dec[t] / s_out[t];   b_enc and thresholds stay.

    Args:
        clt: the CLT, with `input_scale` and `output_scale` in its config.
        dtype: number type of the result; that of training where left out. The products are taken in float64.
    """
    cfg = clt.transcoder_config
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    kind = {"dtype": torch.float64, "device": clt.b_dec.device}
    s_in = torch.tensor(cfg.input_scale or [1.0] * cfg.n_layers, **kind)
    s_out = torch.tensor(cfg.output_scale or [1.0] * cfg.n_layers, **kind)
    final = getattr(torch, cfg.dtype)
    decoders = []
    for source, W_dec in enumerate(clt.W_dec):
        targets = cfg.targets(source)
        slots = W_dec.double().unflatten(1, (len(targets), cfg.d_model))
        decoders.append((slots / s_out[targets.start : targets.stop, None]).to(final))
    exported = CrossLayerTranscoder(cfg, DenseDecoders(decoders)).to(clt.b_dec.device)

    def fill(name: str, value: Tensor) -> None:
        getattr(exported, name).copy_(value)

    fill("W_enc", _stacked(clt.W_enc).mT * s_in[:, None, None])
    fill("b_enc", _stacked(clt.b_enc))
    fill("b_dec", clt.b_dec.double() / s_out[:, None])
    if clt.log_threshold is not None:
        fill("threshold", torch.stack([t.double() for t in clt.thresholds()]))
    return exported


def _stacked(per_layer: torch.nn.ParameterList) -> Tensor:
    return torch.stack([p.double() for p in per_layer])
