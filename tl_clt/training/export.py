"""From a CLT in training, on scaled activations, to a `CrossLayerTranscoder` on raw ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tl_clt.training.clt import InferenceCLT, TrainingCLT
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.decoders import DenseDecoders


@torch.no_grad()
def export(clt: TrainingCLT | InferenceCLT, dtype: str | None = None) -> CrossLayerTranscoder:
    """A `CrossLayerTranscoder` with the scaling of training folded into its weights, exactly.

    With x_scaled = s_in * x and y_scaled = s_out * y:
        W_enc[s].T * s_in[s],   W_dec[s -> t] / s_out[t],   b_dec[t] / s_out[t],   W_skip[t] * s_in[t] / s_out[t];
        b_enc and thresholds stay.
    Decoders of low rank become full. Where k features of each layer and token are kept, which are ranked by
    hidden_pre * ||W_dec,i||, that norm moves from the decoder to the encoder: ranking by hidden_pre, as a
    `CrossLayerTranscoder` does, is then the same. Other selections become JumpReLU, with thresholds
    score_threshold / ||W_dec,i||.

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
    moved = _moved_norms(clt)
    for source, pairs in enumerate(clt.decoders(torch.float64)):
        slots = [W / moved[source][:, None] / s_out[target] for target, W in pairs.items()]
        decoders.append(torch.stack(slots, dim=1).to(final))
    exported = CrossLayerTranscoder(cfg, DenseDecoders(decoders)).to(clt.b_dec.device)

    def fill(name: str, value: Tensor) -> None:
        getattr(exported, name).copy_(value)

    fill("W_enc", (_stacked(clt.W_enc) * moved[..., None]).mT * s_in[:, None, None])
    fill("b_enc", _stacked(clt.b_enc) * moved)
    fill("b_dec", clt.b_dec.double() / s_out[:, None])
    if cfg.has_threshold:
        fill("threshold", torch.stack([t.double() for t in clt.thresholds()]))
    if clt.W_skip is not None:
        fill("W_skip", _stacked(clt.W_skip) * (s_in / s_out)[:, None, None])
    return exported


def _moved_norms(clt: TrainingCLT | InferenceCLT) -> Tensor:
    """The factor [n_layers, d_transcoder] that moves from decoders to encoders."""
    if clt.cfg.selects and not clt.cfg.has_score_threshold:
        norms = torch.stack(clt.norms(torch.float64))
        return torch.where(norms > 0, norms, 1.0)
    return torch.ones(clt.cfg.n_layers, clt.cfg.d_transcoder, dtype=torch.float64, device=clt.b_dec.device)


def _stacked(per_layer: torch.nn.ParameterList) -> Tensor:
    return torch.stack([p.double() for p in per_layer])
