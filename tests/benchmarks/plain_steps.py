"""What the benchmark compares with: whole training steps of a CLT in plain torch, without any trainer.

Weights are one tensor a source layer: W_enc [d_transcoder, d_model], W_dec [d_transcoder, n_writes * d_model].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

THRESHOLD, BANDWIDTH, TANH_SCALE, SPARSITY, LR = 0.03, 1.0, 4.0, 0.3, 4e-4


class JumpReLU(torch.autograd.Function):
    """Strict JumpReLU; the straight-through gradient of a rectangular window reaches the threshold only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, threshold = ctx.saved_tensors
        in_window = (x - threshold).abs() < BANDWIDTH / 2
        grad_threshold = -(grad * in_window).sum(dim=0) * threshold / BANDWIDTH
        return grad * (x > threshold), grad_threshold


class PlainCLT(nn.Module):
    """Weights, and the two steps' losses."""

    def __init__(self, n_layers: int, d_model: int, d_transcoder: int, device: str) -> None:
        super().__init__()
        kind = {"device": device}

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **kind).uniform_(-bound, bound))

        layers = range(n_layers)
        enc, dec = d_transcoder**-0.5, (n_layers * d_model) ** -0.5
        self.W_enc = nn.ParameterList([uniform(enc, d_transcoder, d_model) for _ in layers])
        self.b_enc = nn.ParameterList([nn.Parameter(torch.zeros(d_transcoder, **kind)) for _ in layers])
        self.W_dec = nn.ParameterList([uniform(dec, d_transcoder, (n_layers - s) * d_model) for s in layers])
        self.b_dec = nn.Parameter(torch.zeros(n_layers * d_model, **kind))
        self.log_threshold = nn.ParameterList(
            [nn.Parameter(torch.full((d_transcoder,), THRESHOLD, **kind).log()) for _ in layers]
        )

    def dense_loss(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Squared error + lambda * sum tanh(c * norm * activation), JumpReLU, one product a layer."""
        recons: Tensor = self.b_dec.expand(len(inputs), -1)
        sparsity = torch.zeros((), device=inputs.device)
        for s, x in enumerate(inputs.unbind(dim=1)):
            hidden_pre = torch.addmm(self.b_enc[s], x, self.W_enc[s].T)
            acts = JumpReLU.apply(hidden_pre, self.log_threshold[s].exp())
            norms = self.W_dec[s].norm(dim=1)
            sparsity = sparsity + torch.tanh(acts * (TANH_SCALE * norms)).sum()
            recons = recons + _after(acts @ self.W_dec[s], recons)
        return ((recons - outputs).square().sum() + SPARSITY * sparsity) / len(inputs)

    def topk_loss(self, inputs: Tensor, outputs: Tensor, k: int) -> Tensor:
        """Squared error, TopK per layer, decoded through `embedding_bag`."""
        recons: Tensor = self.b_dec.expand(len(inputs), -1)
        for s, x in enumerate(inputs.unbind(dim=1)):
            hidden_pre = torch.addmm(self.b_enc[s], x, self.W_enc[s].T)
            kept = torch.topk(hidden_pre, k, dim=1, sorted=False)
            written = F.embedding_bag(
                kept.indices, self.W_dec[s], per_sample_weights=torch.relu(kept.values), mode="sum"
            )
            recons = recons + _after(written, recons)
        return (recons - outputs).square().sum() / len(inputs)


def _after(written: Tensor, recons: Tensor) -> Tensor:
    """Zeros for the layers below the source, then what it writes."""
    return F.pad(written, (recons.shape[1] - written.shape[1], 0))


def plain_step(clt: PlainCLT, loss: Callable[[Tensor, Tensor], Tensor], batch: Tensor) -> Callable[[], None]:
    """One step: forward, loss, backward, clip by the global norm, fused Adam.

    Args:
        clt: the weights.
        loss: of inputs [batch, n_layers, d_model] and outputs [batch, n_layers * d_model].
        batch: [batch, 2, n_layers, d_model].
    """
    optimizer = torch.optim.Adam(clt.parameters(), lr=LR, fused=True)
    inputs, outputs = batch[:, 0], batch[:, 1].flatten(start_dim=1)

    def step() -> None:
        loss(inputs, outputs).backward()
        torch.nn.utils.clip_grad_norm_(clt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
