"""A constrained intervention at every end layer (Methods, "Constrained patching")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pandas import DataFrame
from tqdm.auto import tqdm

from tl_clt.arguments import as_switch
from tl_clt.attribution.targets import TargetsGiven
from tl_clt.errors import InterventionError
from tl_clt.interventions.intervention import AnyIntervention, as_interventions
from tl_clt.interventions.sweeps.outcomes import Outcomes
from tl_clt.lens import Freeze, HookedModel, Prompt
from tl_clt.replacement import check_fit
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class EndLayerSweep:
    """What `sweep_end_layer` found."""

    table: DataFrame
    """One row for each end layer and named token: through_layer, token, token_id, probability, change (of it, from
    the clean run), logit (less the mean logit over the vocabulary), logit_change."""

    @property
    def summary(self) -> DataFrame:
        """One row for each token: token, clean (probability without the intervention), mean and mean_change over
        all end layers, best, best_change and best_layer. The best layer is the one whose change is largest in
        size; it was picked after the fact, and the mean says what a layer named beforehand would have given."""
        rows = []
        for _, at in self.table.groupby("token_id", sort=False):
            best = at.loc[at["change"].abs().idxmax()]
            mean, mean_change = at["probability"].mean(), at["change"].mean()
            clean = best["probability"] - best["change"]
            at_best = (best["probability"], best["change"], best["through_layer"])
            rows.append((best["token"], clean, mean, mean_change, *at_best))
        names = ["token", "clean", "mean", "mean_change", "best", "best_change", "best_layer"]
        return DataFrame(rows, columns=names)

    def plot(self) -> Figure:
        """Change of each token's probability against the end layer, its mean dotted. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.subplots()
        for _, rows in self.table.groupby("token_id", sort=False):
            token = rows["token"].iloc[0]
            [line] = axes.plot(rows["through_layer"], rows["change"], marker="o", label=repr(token))
            mean = rows["change"].mean()
            axes.axhline(mean, color=line.get_color(), linestyle=":", label=f"{token!r}, mean {mean:+.2f}")
        axes.axhline(0, color="grey", linewidth=0.8)
        layers = sorted(self.table["through_layer"].unique())
        axes.set_xticks(layers[:: -(-len(layers) // 16)])
        axes.set(xlabel="last layer whose MLP output is held (through_layer)", ylabel="change of probability")
        axes.set_title("Constrained intervention by end layer")
        axes.grid(linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def sweep_end_layer(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    interventions: AnyIntervention | Iterable[AnyIntervention],
    tokens: TargetsGiven,
    *,
    pos: int = -1,
    freeze: Freeze = "attention",
    progress: bool = True,
) -> EndLayerSweep:
    """Run a constrained intervention with every possible end layer.

    `through_layer` goes from the highest layer that is changed to the last. How far the MLPs are held is a free
    choice that changes the outcome, so the summary gives the mean over layers beside the best one.

    Args:
        model, clt, prompt, interventions, tokens, pos, freeze, progress: as for `sweep_strength`.

    Raises:
        InterventionError: no intervention, or what `intervene` refuses.
        TargetError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as there.
    """
    check_fit(model, clt)
    given = as_interventions(interventions)
    if not given:
        raise InterventionError("There are no interventions to sweep: give at least one.")
    quiet = not as_switch("progress", progress)
    outcomes = Outcomes(model, clt, prompt, tokens, pos, freeze)
    clean = outcomes.read(outcomes.clean())
    # `intervene` says what is wrong with a layer that is not there.
    first = min(max(what.layer for what in given), clt.cfg.n_layers - 1)
    rows = []
    for layer in tqdm(range(first, clt.cfg.n_layers), desc="end layers", delay=2.0, disable=quiet):
        for before, now in zip(clean, outcomes.read(outcomes.of(given, layer)), strict=True):
            p, logit = now.probability, now.logit
            rows.append((layer, now.token, now.token_id, p, p - before.probability, logit, logit - before.logit))
    names = ["through_layer", "token", "token_id", "probability", "change", "logit", "logit_change"]
    return EndLayerSweep(table=DataFrame(rows, columns=names))
