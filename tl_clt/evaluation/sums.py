"""Running sums over tokens, in float64, from which a report is made. Nothing of a batch outlives it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.evaluation.replaced import ablating_hooks, replaced
from tl_clt.lens import FwdHook, HookedModel, block_hook, run_with_hooks
from tl_clt.replacement import attach
from tl_clt.shapes import Logits, TokenBatch
from tl_clt.transcoder import CrossLayerTranscoder

UNCERTAIN_BELOW = 0.8
"""Probability of the right token below which the paper counts agreement."""
COMPARED_AT_ONCE = 2**22
"""Logits that are compared at a time: 32 MiB in float64."""


class LayerSums:
    """What the CLT gives on the model's own activations, layer by layer; position 0 of each prompt left out."""

    def __init__(self, clt: CrossLayerTranscoder) -> None:
        cfg, device = clt.cfg, clt.W_enc.device
        wide = {"dtype": torch.float64, "device": device}
        self.clt = clt
        self.out = torch.zeros(cfg.n_layers, cfg.d_model, **wide)
        self.out_squared = torch.zeros(cfg.n_layers, **wide)
        self.error_squared = torch.zeros(cfg.n_layers, **wide)
        self.fired = torch.zeros(cfg.n_layers, cfg.d_transcoder, dtype=torch.long, device=device)
        """Tokens at which each feature is active."""
        self.activation = torch.zeros(cfg.n_layers, cfg.d_transcoder, **wide)
        """Sum of each feature's absolute activations."""

    def hooks(self) -> list[FwdHook]:
        """Hooks, for a pass with the CLT attached, that add what they see."""
        return [hook for t in self.clt.layers for hook in self._hooks(t)]

    def _hooks(self, layer: int) -> list[FwdHook]:
        recons: list[Tensor] = []

        def add_acts(acts: Float[Tensor, "batch pos d_transcoder"], hook: object) -> None:
            acts = acts[:, 1:].flatten(0, 1)
            self.fired[layer] += acts.count_nonzero(dim=0)
            self.activation[layer] += acts.abs().sum(dim=0, dtype=torch.float64)

        def note_recons(tensor: Float[Tensor, "batch pos d_model"], hook: object) -> None:
            recons[:] = [tensor[:, 1:].flatten(0, 1).double()]

        def add_error(tensor: Float[Tensor, "batch pos d_model"], hook: object) -> None:
            error = tensor[:, 1:].flatten(0, 1).double()
            out = recons.pop() + error
            self.out[layer] += out.sum(dim=0)
            self.out_squared[layer] += out.square().sum()
            self.error_squared[layer] += error.square().sum()

        points = {"hook_acts_post": add_acts, "hook_recons": note_recons, "hook_error": add_error}
        return [(block_hook(layer, f"clt.{name}"), hook) for name, hook in points.items()]


class PredictionSums:
    """Next-token predictions of the model, of the model with its MLPs replaced, and with them silenced."""

    def __init__(self) -> None:
        self.n = 0
        """Tokens whose prediction was compared: all but position 0."""
        self.agree = 0
        self.kl = 0.0
        self.n_next = 0
        """Tokens whose next token is in the prompt."""
        self.n_uncertain = 0
        """Tokens whose next one the model finds with a probability below 0.8."""
        self.uncertain_agree = 0
        self.loss, self.loss_replaced, self.loss_ablated = 0.0, 0.0, 0.0

    def add_replaced(self, logits: Logits, other: Logits, tokens: TokenBatch) -> None:
        """Compare the replaced model's logits with the model's."""
        for p, q, following in _in_parts(tokens, logits, other):
            log_p, log_q = p.double().log_softmax(dim=-1), q.double().log_softmax(dim=-1)
            best, best_other = log_p.argmax(dim=-1), log_q.argmax(dim=-1)
            self.n += len(log_p)
            self.agree += int((best == best_other).sum())
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())
            n = len(following)
            of_next = _of(log_p, following)
            found = (best[:n] == following) & (of_next.exp() < UNCERTAIN_BELOW)
            self.n_next += n
            self.n_uncertain += int(found.sum())
            self.uncertain_agree += int((found & (best_other[:n] == following)).sum())
            self.loss -= float(of_next.sum())
            self.loss_replaced -= float(_of(log_q, following).sum())

    def add_ablated(self, logits: Logits, tokens: TokenBatch) -> None:
        """Add the loss of the model without MLPs."""
        for p, following in _in_parts(tokens, logits):
            self.loss_ablated -= float(_of(p.double().log_softmax(dim=-1), following).sum())


@torch.no_grad()
def add_batch(
    layers: LayerSums, predictions: PredictionSums, model: HookedModel, clt: CrossLayerTranscoder, tokens: TokenBatch
) -> None:
    """Three passes over a batch: the model with the CLT looking on, with it in place of the MLPs, and without MLPs."""
    with attach(model, clt, mode="observe"):
        logits = run_with_hooks(model, tokens, layers.hooks())
    with replaced(model, clt):
        other = model(tokens)
    predictions.add_replaced(logits, other, tokens)
    del logits, other
    predictions.add_ablated(run_with_hooks(model, tokens, ablating_hooks(clt)), tokens)


def _in_parts(tokens: TokenBatch, *logits: Logits) -> Iterator[tuple[Tensor, ...]]:
    """Logits [rows, d_vocab] after position 0, a few rows at a time, and the tokens that follow these positions: at
    the end of a prompt one fewer."""
    size = max(1, COMPARED_AT_ONCE // logits[0].shape[-1])
    for prompt, row in enumerate(tokens):
        for at in range(1, len(row), size):
            yield *(x[prompt, at : at + size] for x in logits), row[at + 1 : at + 1 + size]


def _of(log_probs: Float[Tensor, "rows d_vocab"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log probabilities of tokens, of which there may be one fewer."""
    return log_probs[: len(tokens)].gather(1, tokens[:, None])[:, 0]
