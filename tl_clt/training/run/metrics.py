"""What a trained CLT reaches on text that was kept out of training, and the thresholds that this text sets.

Everything is counted as `tl_clt.evaluation.evaluate` counts it: all tokens but the first of each prompt, those of
huge norm among them, which training left out. What `exclude_special_tokens` names is left out within a prompt too,
where it stands between two rows of text: `evaluate` does not join rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from tl_clt.training.clt import SMALLEST_NORM, CLTStep, Step, TrainingCLT
from tl_clt.training.data.batches import ActivationBatch
from tl_clt.transcoder import explained_variance


class Metrics(NamedTuple):
    """Measured on held-out text, but for `dead_share_in_training`."""

    explained_variance: float
    """Mean over layers of 1 - squared error / variance about the mean, as in `EvaluationReport`."""

    explained_variance_per_layer: list[float]
    """That of each layer."""

    nmse: float
    """Mean over layers of squared error / squared norm of the outputs."""

    l0_sum_over_layers: float
    """Features that fire at a token, of all layers together."""

    l0_mean_per_layer: float
    """l0_sum_over_layers / n_layers."""

    l0_per_layer: list[float]
    """Features that fire at a token, of each layer."""

    dead_share: float
    """Share of features that fire at none of the `n_tokens` tokens."""

    dead_share_in_training: float
    """Share of features whose density, over the last `dead_window_steps` training steps, is below
    `dead_feature_density`; such as fired at no token of them always count."""

    dead_window_steps: int
    """`dead_feature_window`, or the last eighth of a run shorter than eight times that: at the start every feature
    fires, so a longer window would find none dead."""

    n_tokens: int
    """Tokens on which all but `dead_share_in_training` was measured."""

    held_out: bool
    """Whether training left these tokens' prompts out. False where the dataset has too few to spare any."""

    l0_before_thresholds: list[float] | None
    """Features that fired at a token of each layer before thresholds were set by `fit_thresholds`; None where they were
    not."""

    def in_words(self, l0_asked_for: float | None) -> str:
        """What a newcomer should know of the CLT.

        Args:
            l0_asked_for: active features per token that each layer was to have; None where a lambda was given.
        """
        ev, l0 = self.explained_variance_per_layer, self.l0_per_layer
        worst = min(range(len(ev)), key=ev.__getitem__)
        text = "text kept out of training" if self.held_out else "text that was trained on, too short to keep any out"
        wanted = "" if l0_asked_for is None else f"; {l0_asked_for:g} were asked for"
        sentences = [
            f"On {self.n_tokens:,} tokens of {text}, the CLT explains {self.explained_variance:.0%} of the variance of"
            f" MLP outputs, mean over layers ({ev[worst]:.0%} in layer {worst}, the least).",
            f"{self.l0_mean_per_layer:.3g} features of a layer are active at a token (by layer {min(l0):.3g} to"
            f" {max(l0):.3g}{wanted}), and {self.dead_share:.0%} of all features at none of them.",
        ]
        worse = [layer for layer, of_layer in enumerate(ev) if of_layer < 0]
        if worse:
            sentences.append(
                f"In layers {_joined(worse)} it is worse than the mean output would be (explained variance below 0)."
                " The run may be too short (give more training_tokens), lr too high, or too few features active (raise"
                " target_l0 or k, or lower sparsity_coefficient, whichever was set); or the text has tokens of very"
                " large norm, which training left out and these metrics count."
            )
        silent = [layer for layer, of_layer in enumerate(l0) if of_layer == 0]
        if silent:
            sentences.append(
                f"Layers {_joined(silent)} are silent: raise target_l0 or k, or lower sparsity_coefficient, whichever"
                " was set, or give more training_tokens."
            )
        if l0_asked_for is not None:
            missed = [
                s for s, of_layer in enumerate(l0) if of_layer > 0 and abs(of_layer / l0_asked_for - 1) > MISSED_BY
            ]
            if missed:
                sentences.append(
                    f"The L0 that was asked for was missed by more than a tenth in layers {_joined(missed)}:"
                )
                few = self.l0_before_thresholds is None and all(l0[s] < l0_asked_for for s in missed)
                sentences.append(
                    "fewer features than that are positive at their tokens. Give more features or training_tokens."
                    if few
                    else "the text by which thresholds were set is another, or too few features are positive. Give more"
                    " n_eval_prompts or training_tokens, or activation='topk'."
                )
        return " ".join(sentences)


MISSED_BY = 0.1
"""Share by which L0 may be off what was asked for before a run says so."""


def _joined(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


@torch.no_grad()
def measure(
    clt: TrainingCLT,
    batches: Iterable[ActivationBatch],
    step: Step,
    *,
    dead_share_in_training: float,
    dead_window_steps: int,
    held_out: bool = True,
    l0_before_thresholds: list[float] | None = None,
) -> Metrics:
    """The final metrics.

    Args:
        clt: the trained CLT.
        batches: scaled inputs and outputs; on a grid, the same for every rank.
        step: computes the forward pass.
        dead_share_in_training: see `Metrics`, as the rest.
        dead_window_steps: see `Metrics`.
        held_out: see `Metrics`.
        l0_before_thresholds: see `Metrics`.
    """
    n_layers, width = clt.cfg.n_layers, clt.cfg.d_in
    total = torch.zeros(n_layers, width, dtype=torch.float64, device=clt.device)
    squared, error = (torch.zeros(n_layers, dtype=torch.float64, device=clt.device) for _ in range(2))
    fired, n = torch.zeros(clt.cfg.d_sae, dtype=torch.long, device=clt.device), 0
    for batch in batches:
        result = _look(clt, batch, step)
        y = batch[:, 1].double()
        error += (result.recons - y).square().sum(dim=(0, 2))
        squared += y.square().sum(dim=(0, 2))
        total += y.sum(dim=0)
        fired += clt.count_firing(result) // clt.grid.n_data_parallel  # which counts every rank's tokens
        n += len(y)
    centred = squared - total.square().sum(dim=1) / max(n, 1)
    explained = explained_variance(error, centred, squared)
    l0 = clt.l0_per_layer(fired, n)
    return Metrics(
        explained_variance=explained.mean,
        explained_variance_per_layer=explained.per_layer,
        nmse=float((error / squared.clamp_min(1e-30)).mean()),
        l0_sum_over_layers=float(l0.sum()),
        l0_mean_per_layer=float(l0.mean()),
        l0_per_layer=l0.tolist(),
        dead_share=float((fired == 0).double().mean()),
        dead_share_in_training=dead_share_in_training,
        dead_window_steps=dead_window_steps,
        n_tokens=n,
        held_out=held_out,
        l0_before_thresholds=l0_before_thresholds,
    )


def _look(clt: TrainingCLT, batch: ActivationBatch, step: Step) -> CLTStep:
    """A forward pass as at inference, with the k that training ended with."""
    clt.eval()
    without_penalties: dict[str, float] = {"sparsity": 0.0, "dead_feature": 0.0, "auxk": 0.0}
    return clt.step(TrainStepInput(batch, without_penalties, None, clt.cfg.k_anneal_steps, False), step)


def sets_thresholds(clt: TrainingCLT) -> bool:
    """Whether `fit_thresholds` has something to do: L0 was asked for, and thresholds decide it at inference."""
    cfg = clt.cfg
    return cfg.has_score_threshold or (cfg.activation == "jumprelu" and cfg.target_l0 is not None)


MORE_THAN_WANTED = 4
"""Largest scores of a batch and layer that are looked at, as a multiple of those to keep. Where layers compete, one may
keep what all are to keep together."""


CLOSE_ENOUGH = 0.075
"""Share by which a layer's L0 may be off before the thresholds of jumprelu are moved."""


@torch.no_grad()
def fit_thresholds(clt: TrainingCLT, batches: Iterable[ActivationBatch], step: Step) -> list[float]:
    """Set thresholds so that as many features fire as were asked for, in the mean over these tokens:

        batchtopk, all_layers  score_threshold = t,   of each layer, or one for all
        jumprelu               theta_i <- max(0, theta_i + t / ||W_dec,i||),   t of each layer

    A layer of jumprelu features whose L0 is within `CLOSE_ENOUGH` of what was asked for stays as it is: what training
    found is better than a common shift, which takes the last tokens from features that fire weakly.
    t is halfway between the smallest score that is to be kept and the largest that is not. Scores are
    hidden_pre * ||W_dec,i||, and for jumprelu (hidden_pre - theta_i) * ||W_dec,i||. Features whose hidden_pre is
    negative never fire: where too few are positive, fewer fire than were asked for.

    Args:
        clt: its thresholds are changed in place.
        batches: scaled inputs and outputs of the tokens; on a grid, the same for every rank.
        step: computes the forward pass.

    Returns:
        features that fired at a token before that, of each layer.
    """
    cfg = clt.cfg
    layers = range(cfg.n_layers)
    wanted = float(cfg.k if cfg.selects else cfg.target_l0)
    norms = [norm.clamp(min=SMALLEST_NORM) for norm in clt.norms()]
    thetas = clt.thresholds()
    largest: list[list[Tensor]] = [[] for _ in layers]
    together = cfg.topk_across == "all_layers"
    multiple = max(MORE_THAN_WANTED, cfg.n_layers) if together else MORE_THAN_WANTED
    fired, n = torch.zeros(cfg.d_sae, dtype=torch.long, device=clt.device), 0
    for batch in batches:
        result = _look(clt, batch, step)
        fired += clt.count_firing(result) // clt.grid.n_data_parallel  # which counts every rank's tokens
        n += len(batch)
        for s in layers:
            h = result.hidden_pre[s].float()
            scores = (h if cfg.selects else h - thetas[s]) * norms[s]
            # A feature with a negative hidden_pre must not fire.
            scores = torch.where(h > 0, scores, -torch.inf).flatten()
            most = min(len(scores), multiple * max(1, round(wanted * len(batch))))
            largest[s].append(torch.topk(scores, most, sorted=False).values)
    before = clt.l0_per_layer(fired, n).tolist()
    if n == 0:
        return before
    for group in [list(layers)] if together else [[s] for s in layers]:
        if not cfg.has_score_threshold and abs(before[group[0]] - wanted) <= CLOSE_ENOUGH * wanted:
            continue
        scores_here = torch.cat([scores for s in group for scores in largest[s]])
        # Of data-parallel ranks each has every score once.
        copies = clt.grid.n_data_parallel
        t = _between(clt.grid.all_of_any_length(scores_here), copies * round(wanted * n * len(group)))
        for s in group:
            if cfg.has_score_threshold:
                clt.score_threshold[s] = max(t, 0.0)
            else:
                theta = (thetas[s] + t / norms[s]).clamp(min=SMALLEST_NORM)
                clt.log_threshold[s].copy_(theta.log())
    return before


def _between(scores: Float[Tensor, " n"], n_kept: int) -> float:
    """Halfway between the `n_kept`-th largest score and the next; below all where there are no more than so many."""
    scores = scores[scores.isfinite()]
    if len(scores) <= n_kept:
        return float(scores.min()) - 1e-6 if len(scores) > 0 else 0.0
    two = torch.topk(scores, n_kept + 1).values[-2:] if n_kept > 0 else scores.max().expand(2)
    return float(two.double().mean())


def cut_alike(batches: Iterator[ActivationBatch], size: int) -> Iterator[ActivationBatch]:
    """The same tokens in batches of `size`; the last has what is left."""
    rest: Tensor | None = None
    for batch in batches:
        rest = batch if rest is None or len(rest) == 0 else torch.cat([rest, batch])
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest is not None and len(rest) > 0:
        yield rest
