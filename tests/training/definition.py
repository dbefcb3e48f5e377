"""A training step as the formulas have it: dense tensors, plain loops over layers, autograd for everything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from tl_clt.training.clt import TrainingCLT
from tl_clt.training.losses import jumprelu, step_function


class Definition(NamedTuple):
    recons: Tensor
    losses: dict[str, Tensor]
    acts: list[Tensor]

    @property
    def loss(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


def decoders(clt: TrainingCLT) -> list[dict[int, Tensor]]:
    """For each source, the decoder [d_transcoder, d_model] to each target."""
    cfg, d = clt.transcoder_config, clt.cfg.d_in
    result = []
    for s, W in enumerate(clt.W_dec):
        targets = list(cfg.targets(s))
        if clt.cfg.far_rank is None or len(targets) == 1:
            result.append({t: W[:, j * d : (j + 1) * d] for j, t in enumerate(targets)})
        else:
            r, pairs = clt.cfg.far_rank, {s: W[:, :d]}
            for j, t in enumerate(targets[1:]):
                pairs[t] = W[:, d + j * r : d + (j + 1) * r] @ clt.W_far[s][j]
            result.append(pairs)
    return result


def selected(clt: TrainingCLT, scores: Tensor, k: int) -> Tensor:
    """The mask [batch, n_layers, d_transcoder] of kept features, by sorting."""
    cfg, (batch, n_layers, _) = clt.cfg, scores.shape
    per_token = cfg.activation == "topk"
    groups = scores[:, None] if cfg.topk_across == "all_layers" else scores.unbind(dim=1)
    masks = []
    for group in groups.unbind(dim=1) if isinstance(groups, Tensor) else groups:
        flat = group.flatten(start_dim=1) if per_token else group.flatten()[None]
        n = k * (n_layers if cfg.topk_across == "all_layers" else 1) * (1 if per_token else batch)
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept.scatter_(1, flat.argsort(dim=1, descending=True)[:, :n], True)
        masks.append(kept.view(group.shape))
    mask = masks[0] if cfg.topk_across == "all_layers" else torch.stack(masks, dim=1)
    return mask & (scores > 0)


def write(clt: TrainingCLT, acts: list[Tensor]) -> Tensor:
    total = [acts[0].new_zeros(len(acts[0]), clt.cfg.d_in) for _ in acts]
    for a, pairs in zip(acts, decoders(clt), strict=True):
        for t, W in pairs.items():
            total[t] = total[t] + a @ W
    return torch.stack(total, dim=1)


def define(clt: TrainingCLT, step_input: TrainStepInput, k: int | None = None) -> Definition:
    cfg, c = clt.cfg, step_input.coefficients
    inputs, outputs = step_input.sae_in.unbind(dim=1)
    norms = [torch.cat(list(pairs.values()), dim=1).norm(dim=1) for pairs in decoders(clt)]
    h = [inputs[:, s] @ W.T + b for s, (W, b) in enumerate(zip(clt.W_enc, clt.b_enc, strict=True))]
    theta = (
        [torch.zeros_like(b) for b in clt.b_enc] if clt.log_threshold is None else [t.exp() for t in clt.log_threshold]
    )
    straight = (cfg.jumprelu_bandwidth, cfg.straight_through)
    if cfg.selects:
        scores = torch.stack([a * n for a, n in zip(h, norms, strict=True)], dim=1).detach()
        acts = [a * m for a, m in zip(h, selected(clt, scores, k or cfg.k).unbind(dim=1), strict=True)]
    elif cfg.activation == "jumprelu":
        acts = [jumprelu(a, t, *straight) for a, t in zip(h, theta, strict=True)]
    else:
        acts = [a.relu() for a in h]
    recons = write(clt, acts) + clt.b_dec
    if cfg.skip:
        recons = recons + torch.stack([inputs[:, t] @ W for t, W in enumerate(clt.W_skip)], dim=1)
    n = len(inputs)
    losses = {"mse_loss": (recons - outputs).square().sum() / n}
    if cfg.selects:
        losses |= auxk(clt, h, (outputs - recons).detach(), step_input)
        return Definition(recons, losses, acts)
    if cfg.sparsity_loss == "tanh":
        counts = sum((a * w * cfg.tanh_scale).tanh().sum(dim=1) for a, w in zip(acts, norms, strict=True))
    else:
        counts = sum(step_function(a, t, *straight).sum(dim=1) for a, t in zip(h, theta, strict=True))
    if cfg.sparsity_loss == "quadratic_l0":
        counts = (counts / (cfg.n_layers * cfg.target_l0) - 1).square()
    losses["sparsity_loss"] = c["sparsity"] * counts.mean()
    dead = sum(((t - a).relu() * w).sum() for a, t, w in zip(h, theta, norms, strict=True)) / n
    losses["dead_feature_loss"] = c["dead_feature"] * dead
    return Definition(recons, losses, acts)


def auxk(clt: TrainingCLT, h: list[Tensor], residual: Tensor, step_input: TrainStepInput) -> dict[str, Tensor]:
    dead = step_input.dead_neuron_mask
    if dead is None or not dead.any():
        return {}
    chosen = []
    for a, mask in zip(h, dead.unflatten(0, (clt.cfg.n_layers, -1)), strict=True):
        ranked = torch.where(mask, a.detach(), -torch.inf).argsort(dim=1, descending=True)
        keep = torch.zeros_like(a).scatter(1, ranked[:, : min(clt.cfg.k_aux, int(mask.sum()))], 1.0)
        chosen.append(a * keep)
    share = min(1.0, int(dead.sum()) / (clt.cfg.n_layers * clt.cfg.k_aux))
    error = (residual - write(clt, chosen)).square().sum() / len(residual)
    return {"auxk_loss": step_input.coefficients["auxk"] * share * error}
