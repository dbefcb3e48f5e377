"""Sparsity against fidelity: neurons, per-layer transcoders and CLTs on the same held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pandas import DataFrame, to_numeric
from tqdm.auto import tqdm

from tl_clt.errors import ConfigError
from tl_clt.evaluation.evaluate import evaluate
from tl_clt.evaluation.neurons import ThresholdedNeurons, thresholded_neurons
from tl_clt.evaluation.prompts import DEFAULT_CONTEXT, HeldOut, batches, held_out_prompts, up_to
from tl_clt.evaluation.report import EvaluationReport
from tl_clt.lens import HookedModel, model_name
from tl_clt.replacement import check_fit
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.formats.writing import files_into

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_clt.training import CLTTrainingRunnerConfig
    from tl_clt.training.data.dataset import DatasetSource

THRESHOLD_TOKENS = 4096
"""Tokens of the text on which neurons' thresholds are found."""


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """What `compare` gives."""

    table: DataFrame
    """One row for each transcoder; columns name, kind (neurons, PLT, CLT, or span n), d_transcoder, and of its report
    `COLUMNS` and the graph numbers `GRAPH_COLUMNS`."""

    reports: dict[str, EvaluationReport]
    """The whole report of each by name."""

    def save(self, folder: str | Path) -> None:
        """Write tradeoff.csv, tradeoff.png and reports.json to a folder, all or nothing; what else is in it stays.

        Raises:
            NotWritten: the path is a file, or the disk is full, for example; none of the three is left.
        """
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        with files_into(Path(folder)) as unfinished:
            self.table.to_csv(unfinished / "tradeoff.csv", index=False)
            (unfinished / "reports.json").write_text(json.dumps(reports, indent=2, allow_nan=False) + "\n")
            self.figure().savefig(unfinished / "tradeoff.png", dpi=120)

    def figure(self) -> Figure:
        """Each number against L0, summed over layers, on a logarithmic axis; NMSE on one as well."""
        from tl_clt.evaluation.tradeoff_figure import draw_tradeoff

        return draw_tradeoff(self.table)


COLUMNS = (
    *("n_tokens", "l0_sum_over_layers", "l0_mean_per_layer", "nmse", "explained_variance", "dead_share"),
    *("top1_agreement", "top1_agreement_uncertain", "kl_divergence", "cross_entropy_recovered"),
)
GRAPH_COLUMNS = ("replacement", "completeness", "completeness_pruned", "path_length", "n_nodes")


def compare(
    model: HookedModel,
    dataset: HeldOut,
    transcoders: Mapping[str, CrossLayerTranscoder],
    neuron_l0s: Sequence[float | int] = (),
    *,
    progress: bool = True,
    **options: Any,
) -> Tradeoff:
    """Evaluate transcoders of one model, and its own neurons at some thresholds, on the same text and prompts.

    Args:
        model: a HookedTransformer; a TransformerBridge where no neurons are asked for.
        dataset: held-out text, as `evaluate` takes it.
        transcoders: CLTs and PLTs by name.
        neuron_l0s: active neurons a layer that thresholds are to let through (`thresholded_neurons`). These are found
            on the first tokens of the same text; only one number a layer is fitted.
        progress: show bars where it takes longer than 2 s.
        options: of `evaluate`.

    Raises:
        ConfigError: there is nothing to compare, or an L0 out of range.
        ModelUnsupported: neurons are asked for of a model whose MLPs are not of plain neurons.
        TlCltError: as `evaluate`.
    """
    candidates: dict[str, CrossLayerTranscoder] = dict(transcoders)
    if neuron_l0s:
        text = up_to(held_out_prompts(model, dataset, options.get("context_size")), THRESHOLD_TOKENS)
        found = thresholded_neurons(model, batches(model, text), neuron_l0s)
        candidates |= {f"neurons-l0-{l0:g}": neurons for l0, neurons in found.items()}
    if not candidates:
        raise ConfigError("There is nothing to compare: give transcoders, or L0s of neurons.")
    for clt in candidates.values():
        check_fit(model, clt)
    reports, rows = {}, []
    for name, clt in tqdm(candidates.items(), desc="Comparing", unit=" transcoders", delay=2.0, disable=not progress):
        reports[name] = evaluate(model, clt, dataset, progress=False, **options)
        rows.append({"name": name, "kind": kind_of(clt), **_row(reports[name])})
    table = DataFrame(rows)
    numbers = table.columns.drop(["name", "kind"])
    table[numbers] = table[numbers].apply(to_numeric)  # a column without any number counts as nan
    return Tradeoff(table=table, reports=reports)


def kind_of(clt: CrossLayerTranscoder) -> str:
    """neurons, PLT, CLT, or span n."""
    if isinstance(clt, ThresholdedNeurons):
        return "neurons"
    span = clt.cfg.n_writes_at_most
    return {1: "PLT", clt.cfg.n_layers: "CLT"}.get(span, f"span {span}")


def train_transcoders(
    model: HookedModel,
    dataset: DatasetSource,
    base: CLTTrainingRunnerConfig,
    sizes: Sequence[int],
    l0s: Sequence[int],
    folder: Path | None = None,
) -> dict[str, CrossLayerTranscoder]:
    """A PLT and a CLT of each size and L0, trained alike.

    TopK, which has exactly the L0 asked for.

    Args:
        dataset: text to train on, not the text that they are compared on.
        base: the runs; span, d_transcoder, activation and k are set here.
        sizes: features per layer.
        l0s: active features per layer and token.
        folder: each is saved in a folder of its name within; None to save none.

    Raises:
        TlCltError: as `CLTTrainingRunner`.
    """
    # Only here, since it loads sae_lens.
    from tl_clt.training import CLTTrainingRunner

    runs = {
        f"{kind}-{size}-l0-{k}": replace(
            base,
            span=span,
            d_transcoder=size,
            activation="topk",
            k=k,
            output_path=None if folder is None else str(folder / f"{kind}-{size}-l0-{k}"),
        )
        for kind, span in (("plt", 1), ("clt", model.cfg.n_layers))
        for size in sizes
        for k in l0s
    }
    return {name: CLTTrainingRunner(cfg, model=model, dataset=dataset).run() for name, cfg in runs.items()}


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, or all of them where two end alike."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def check_training(dataset: str | None, sizes: Sequence[int] | None, l0s: Sequence[int] | None) -> None:
    """Raise unless there is all that training needs, or nothing of it.

    Raises:
        ConfigError: a part is missing.
    """
    given = (dataset is not None, bool(sizes), bool(l0s))
    if any(given) and not all(given):
        raise ConfigError("To train transcoders give --train-on, --d-transcoder and --l0; to train none, none of them.")


def training_config(
    model: HookedModel, training_tokens: int, lr: float, context_size: int | None, device: str, seed: int
) -> CLTTrainingRunnerConfig:
    """The runs of `train_transcoders`: position 0 left out, as in evaluation; lr falls to 0 over the last fifth."""
    from tl_clt.training import CLTSettings, CLTTrainingRunnerConfig, DataSettings

    batch = min(1024, training_tokens)
    return CLTTrainingRunnerConfig(
        clt=CLTSettings(d_transcoder=1),
        data=DataSettings(
            training_tokens=training_tokens,
            train_batch_size_tokens=batch,
            context_size=context_size or min(DEFAULT_CONTEXT, model.cfg.n_ctx),
            n_batches_in_buffer=256,
            seqpos_slice=(1, None),
        ),
        model_name=model_name(model),
        lr=lr,
        lr_decay_steps=training_tokens // batch // 5,
        device=device,
        seed=seed,
    )


def _row(report: EvaluationReport) -> dict[str, Any]:
    # Means over some of the prompts cannot stand beside means over all.
    means = report.graph_means if report.graphs_missing is None else None
    return (
        {"d_transcoder": report.clt["d_transcoder"]}
        | {name: getattr(report, name) for name in COLUMNS}
        | {name: None if means is None else getattr(means, name) for name in GRAPH_COLUMNS}
    )
