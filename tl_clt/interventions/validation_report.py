"""What came of putting a graph to the test: measurements, summaries, figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pandas import DataFrame, Series, concat
from scipy.stats import pearsonr, spearmanr

from tl_clt.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureName = Literal["logits", "features", "signs", "quadrants", "errors"]
PREDICTIONS = {"constrained": ("edge", "influence"), "iterative": ("total", "edge", "influence")}
"""What each kind is compared with; first the one that says of this kind what will happen."""
ROUNDING = 1e-5
"""Effects below this share of the target's activation have no sign."""
SPLITS = ("all", "low", "high")


class Compared(NamedTuple):
    """One prediction beside what was measured, entry by entry."""

    predicted: Series
    measured: Series
    predicted_share: Series
    """|predicted| as a share of the target's activation, or the influence."""
    measured_share: Series
    """|measured| as a share of the target's activation."""
    error_share: Series


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidationReport:
    """What `validate` gives. Constrained and iterative interventions are never put together."""

    measurements: DataFrame
    """One row for each kind of intervention, source and target; columns as `validate` explains them."""

    threshold: float
    """Share of a target's activation from which an effect counts as predicted, or as seen; also of influence."""

    info: dict[str, Any] = field(default_factory=dict)
    """Model, CLT, prompt and options."""

    @classmethod
    def pool(cls, reports: Sequence[ValidationReport]) -> ValidationReport:
        """One report of several prompts, which are numbered in the column `prompt`.

        Raises:
            ConfigError: none, or thresholds, scales or freezing that differ.
        """
        options = {(r.threshold, r.info.get("scale"), r.info.get("freeze")) for r in reports}
        if len(options) != 1:
            raise ConfigError(f"{len(reports)} reports of {len(options)} thresholds, scales and freezings: give one.")
        tables = [r.measurements.assign(prompt=number) for number, r in enumerate(reports)]
        info = {**reports[0].info, "prompt": [r.info.get("prompt") for r in reports]}
        info["n_features"] = sum(r.info.get("n_features", 0) for r in reports)
        return cls(measurements=concat(tables, ignore_index=True), threshold=reports[0].threshold, info=info)

    @cached_property
    def summary(self) -> DataFrame:
        """One row for each kind, `measured_at` (logit or feature), `errors` and prediction; controls left out.

        `errors` splits at the median over the rows: targets of which error nodes carry a low or high share of the
        absolute input. Columns n; spearman and pearson of prediction and measurement (of their signed values, or of
        influence and relative effect), nan where one of them is constant; sign_agreement among effects that both are
        above rounding, and sign_agreement_predicted among those predicted from the threshold on; the counts of the
        four quadrants predicted_seen, predicted_only, seen_only and neither; threshold.
        """
        rows = [
            {
                **{"kind": kind, "measured_at": at, "errors": split, "prediction": prediction},
                **_agreement(_part(compared, split), self.threshold, signed=prediction != "influence"),
                "threshold": self.threshold,
            }
            for kind, at, prediction, compared in self.comparisons()
            for split in SPLITS
        ]
        return DataFrame(rows)

    @cached_property
    def controls(self) -> DataFrame:
        """Features of the first stratum beside their controls: relative effect on the logits, weighted by probability.

        Columns kind, n (pairs), tested_mean, control_mean, tested_median, control_median, larger (share of the pairs
        in which the tested feature's effect is the larger).
        """
        rows = []
        for kind in PREDICTIONS:
            effects = _logit_effects(self._rows(kind, "logit", None))
            control = effects[effects["role"] == "control"]
            tested = effects[effects["role"] == "tested"].set_index(["prompt", "source"])["effect"]
            beside = tested.reindex(list(zip(control["prompt"], control["control_of"], strict=True))).to_numpy()
            other = control["effect"].to_numpy()
            rows.append({"kind": kind, "n": len(other), **_beside(beside, other)})
        return DataFrame(rows)

    def comparisons(self) -> Iterator[tuple[str, str, str, Compared]]:
        """(kind, measured_at, prediction, what is compared), without controls."""
        for kind, predictions in PREDICTIONS.items():
            for at in ("logit", "feature"):
                rows = self._rows(kind, at, "tested")
                for prediction in predictions:
                    yield kind, at, prediction, _compared(rows, at, prediction)

    def figure(self, name: FigureName) -> Figure:
        """One of the figures: "logits", "features" (prediction and influence against effects), "signs", "quadrants",
        "errors" (correlations by how much error nodes carry). Constrained on the left, iterative on the right.

        Raises:
            ConfigError: there is no such figure.
        """
        from tl_clt.interventions.validation_figures import draw

        return draw(self, name)

    def to_json(self) -> str:
        """Everything as JSON: info, threshold, summary, controls, and measurements by column."""
        tables = {name: json.loads(getattr(self, name).to_json(orient="records")) for name in ("summary", "controls")}
        measurements = json.loads(self.measurements.to_json(orient="split", index=False, double_precision=15))
        return json.dumps({"info": self.info, "threshold": self.threshold, **tables, "measurements": measurements})

    def __repr__(self) -> str:
        return f"ValidationReport({len(self.measurements)} measurements of {self.info.get('n_features')} features)"

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.info.items() if name != "prompt")
        tables = (self.summary, self.controls)
        parts = [table.to_string(index=False, float_format=lambda x: f"{x:.3g}") for table in tables]
        return f"{said}\n{parts[0]}\n\nthe most influential features beside their controls\n{parts[1]}"

    def _rows(self, kind: str, at: str, role: str | None) -> DataFrame:
        table = self.measurements
        mask = (table["kind"] == kind) & (table["measured_at"] == at)
        return table[mask if role is None else mask & (table["role"] == role)]


def _compared(rows: DataFrame, at: str, prediction: str) -> Compared:
    activation = rows["target_activation"].abs()
    if prediction != "influence":
        predicted, measured = rows[prediction], rows["change"]
        shares = predicted.abs() / activation, measured.abs() / activation
        return Compared(predicted, measured, *shares, rows["error_share"])
    if at == "logit":
        rows = _logit_effects(rows)
        effect, influence = rows["effect"], rows["source_influence"]
    else:
        effect, influence = rows["act_change"].abs() / activation, rows["influence"]
    return Compared(influence, effect, influence, effect, rows["error_share"])


def _logit_effects(rows: DataFrame) -> DataFrame:
    """One row a source: relative effects on logits, and error shares, averaged with the logits' probabilities."""
    keys = ["prompt", "role", "control_of", "source", "source_influence"]
    weighed = rows.assign(
        effect=rows["weight"] * rows["change"].abs() / rows["target_activation"].abs(),
        error_share=rows["weight"] * rows["error_share"],
    )
    sums = weighed.groupby(keys, as_index=False)[["effect", "error_share", "weight"]].sum()
    return sums.assign(effect=sums["effect"] / sums["weight"], error_share=sums["error_share"] / sums["weight"])


def _part(compared: Compared, split: str) -> Compared:
    if split == "all":
        return compared
    high = compared.error_share > compared.error_share.median()
    return Compared(*(values[high if split == "high" else ~high] for values in compared))


def _agreement(compared: Compared, threshold: float, *, signed: bool) -> dict[str, int | float]:
    predicted, seen = compared.predicted_share >= threshold, compared.measured_share >= threshold
    found: dict[str, int | float] = {
        "n": len(predicted),
        "spearman": _correlation(spearmanr, compared),
        "pearson": _correlation(pearsonr, compared),
        "sign_agreement": float("nan"),
        "sign_agreement_predicted": float("nan"),
    }
    if signed:
        same = np.sign(compared.predicted) == np.sign(compared.measured)
        counted = (compared.predicted_share > ROUNDING) & (compared.measured_share > ROUNDING)
        found["sign_agreement"] = float(same[counted].mean())
        found["sign_agreement_predicted"] = float(same[predicted].mean())
    return found | {
        "predicted_seen": int((predicted & seen).sum()),
        "predicted_only": int((predicted & ~seen).sum()),
        "seen_only": int((~predicted & seen).sum()),
        "neither": int((~predicted & ~seen).sum()),
    }


def _correlation(of: Any, compared: Compared) -> float:
    if compared.predicted.nunique() < 2 or compared.measured.nunique() < 2:
        return float("nan")
    return float(of(compared.predicted, compared.measured).statistic)


def _beside(tested: Any, control: Any) -> dict[str, int | float]:
    if len(control) == 0:
        return dict.fromkeys(("tested_mean", "control_mean", "tested_median", "control_median", "larger"), float("nan"))
    return {
        "tested_mean": float(tested.mean()),
        "control_mean": float(control.mean()),
        "tested_median": float(np.median(tested)),
        "control_median": float(np.median(control)),
        "larger": float((tested > control).mean()),
    }
