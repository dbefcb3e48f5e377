"""What came of putting a graph to the test: measurements, summaries, figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from pandas import DataFrame, Series, concat
from scipy.stats import pearsonr, spearmanr

from tl_clt.errors import ConfigError
from tl_clt.transcoder.formats.writing import new_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureName = Literal["logits", "features", "signs", "quadrants", "errors"]
PREDICTIONS = {"constrained": ("edge", "influence"), "iterative": ("total", "edge", "influence")}
"""What each kind is compared with; first the one that says of this kind what will happen."""
ROUNDING = 1e-5
"""Effects below this share of the target's activation have no sign."""
SPLITS = ("all", "low", "high")
SHARED = ("model_name", "clt_model_name", "scale", "freeze")
"""What reports that are joined must have in common."""


class Compared(NamedTuple):
    """One prediction beside what was measured, entry by entry."""

    predicted: Series
    measured: Series
    predicted_share: Series
    """|predicted| as a share of the target's activation, or the influence."""
    measured_share: Series
    """|measured| as a share of the target's activation."""
    error_share: Series

    def part(self, split: str) -> Compared:
        """Entries whose targets get a low or high share of their input from error nodes; split at the median."""
        if split == "all":
            return self
        high = (self.error_share > self.error_share.median()).to_numpy()
        return Compared(*(values.iloc[np.flatnonzero(high if split == "high" else ~high)] for values in self))


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidationReport:
    """What `validate` gives. Constrained and iterative interventions are never put together."""

    measurements: DataFrame
    """One row for each kind of intervention, source and target; columns as the head of validation.py has them."""

    threshold: float
    """Share of a target's activation from which an effect counts as predicted, or as seen; also of influence."""

    info: dict[str, Any]
    """Model, CLT, options, how many features and controls; `prompts`, of which the column `prompt` has the numbers."""

    @classmethod
    def concat(cls, reports: Sequence[ValidationReport]) -> ValidationReport:
        """One report of all prompts of several.

        Raises:
            ConfigError: there is none, or they are of different models or options.
        """
        if not reports:
            raise ConfigError("There is no report to join. Give at least one.")
        for name in ("threshold", *SHARED):
            found = {r.threshold if name == "threshold" else r.info[name] for r in reports}
            if len(found) > 1:
                raise ConfigError(f"{name} differs ({', '.join(map(str, found))}): join reports that share it.")
        prompts: list[str] = []
        tables = []
        for report in reports:
            tables.append(report.measurements.assign(prompt=report.measurements["prompt"] + len(prompts)))
            prompts += report.info["prompts"]
        sums = {name: sum(r.info[name] for r in reports) for name in ("n_features", "n_controls")}
        return cls(
            measurements=concat(tables, ignore_index=True),
            threshold=reports[0].threshold,
            info={**reports[0].info, "prompts": prompts, **sums},
        )

    @cached_property
    def summary(self) -> DataFrame:
        """One row for each kind, `measured_at` (logit or feature), `errors` and prediction; controls left out.

        `errors` splits at the median: targets of which error nodes carry a low share of the absolute input (`low`, the
        median included), or a high one (`high`, left out where it is empty: one prompt with one logit); error_share is
        the mean share. Columns n; spearman and pearson of prediction and measurement (of their signed values, or of
        influence and relative effect), nan where one of them is constant; sign_agreement among effects that both are
        above rounding, and sign_agreement_predicted among those predicted from the threshold on; the counts of the
        four quadrants predicted_seen, predicted_only, seen_only and neither; threshold.
        """
        rows = [
            {
                **{"kind": kind, "measured_at": at, "prediction": prediction, "errors": split},
                "error_share": float(part.error_share.mean()),
                **_agreement(part, self.threshold, signed=prediction != "influence"),
                "threshold": self.threshold,
            }
            for kind, at, prediction, compared in self.comparisons()
            for split in SPLITS
            if len((part := compared.part(split)).predicted)
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
            effects = _logit_effects(select(self.measurements, kind=kind, measured_at="logit"))
            control = select(effects, role="control")
            tested = select(effects, role="tested")
            tested = DataFrame({"prompt": tested["prompt"], "control_of": tested["source"], "tested": tested["effect"]})
            pairs = control.merge(tested, on=["prompt", "control_of"])
            rows.append({"kind": kind, "n": len(pairs), **_beside(pairs["tested"], pairs["effect"])})
        return DataFrame(rows)

    @cached_property
    def switched_on(self) -> DataFrame:
        """Columns kind and switched_on: how many features a change of one switches on, on average without controls.

        They are not active on the prompt, so no graph of it has them: effects that are seen and not predicted.
        """
        each = select(self.measurements, role="tested").drop_duplicates(["kind", "prompt", "source"])
        return each.groupby("kind", as_index=False).agg(switched_on=("switched_on", "mean"))

    def comparisons(self) -> Iterator[tuple[str, str, str, Compared]]:
        """(kind, measured_at, prediction, what is compared), without controls."""
        for kind, predictions in PREDICTIONS.items():
            for at in ("logit", "feature"):
                rows = select(self.measurements, kind=kind, measured_at=at, role="tested")
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

    def save(self, folder: str | Path) -> Path:
        """Write everything to a new or empty folder, all or nothing.

        `measurements.csv` (one row a measurement), `report.json` (info, threshold, summary, controls and switched_on)
        and each figure as a PNG.

        Raises:
            OutputNotEmpty: the folder holds something already, or is a file.
            NotWritten: the disk is full, for example; nothing is left.
        """
        folder = Path(folder)
        names = ("summary", "controls", "switched_on")
        tables = {name: json.loads(getattr(self, name).to_json(orient="records")) for name in names}
        with new_folder(folder) as unfinished:
            self.measurements.to_csv(unfinished / "measurements.csv", index=False)
            text = json.dumps({"info": self.info, "threshold": self.threshold, **tables}, indent=2)
            (unfinished / "report.json").write_text(text, encoding="utf-8")
            for name in get_args(FigureName):
                self.figure(name).savefig(unfinished / f"{name}.png", dpi=120)
        return folder

    def __repr__(self) -> str:
        return f"ValidationReport({len(self.measurements)} measurements of {self.info['n_features']} features)"

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.info.items() if name != "prompts")
        said = f"{len(self.info['prompts'])} prompts, {said}, threshold {self.threshold:g}"
        tables = (self.summary.drop(columns="threshold"), self.controls, self.switched_on)
        parts = [table.to_string(index=False, float_format=lambda x: f"{x:.3g}") for table in tables]
        titles = (said, "the most influential features beside their controls", "features switched on by a change, mean")
        return "\n\n".join(f"{title}\n{part}" for title, part in zip(titles, parts, strict=True))


def select(table: DataFrame, **equal: str | int) -> DataFrame:
    """The rows that have these values in these columns."""
    for name, value in equal.items():
        table = table.iloc[np.flatnonzero(table[name] == value)]
    return table


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
    sums = weighed.groupby(keys, as_index=False).agg(
        effect=("effect", "sum"), error_share=("error_share", "sum"), weight=("weight", "sum")
    )
    return sums.assign(effect=sums["effect"] / sums["weight"], error_share=sums["error_share"] / sums["weight"])


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
