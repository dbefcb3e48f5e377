"""Sparsity against fidelity: neurons, per-layer transcoders and CLTs on the same held-out text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from pandas import DataFrame, to_numeric
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.errors import ConfigError
from tl_clt.evaluation.evaluate import evaluate
from tl_clt.evaluation.report import EvaluationReport
from tl_clt.lens import HookedModel, block_hook, dtype_of, model_name, neuron_weights, run_with_cache, user_hooks_aside
from tl_clt.lens.weights import NORMALISED
from tl_clt.replacement import check_fit
from tl_clt.report import GREY, PALETTE, Report
from tl_clt.shapes import TokenBatch
from tl_clt.texts import DEFAULT_CONTEXT, HeldOut, batches, held_out_prompts, read_held_out, up_to
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_clt.training import CLTTrainingRunnerConfig
    from tl_clt.training.data.dataset import DatasetSource

FigureName = Literal["tradeoff"]
THRESHOLD_TOKENS = 4096
"""Tokens of the text on which neurons' thresholds are found."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Tradeoff(Report[FigureName]):
    """What `compare` gives.

    Figure: "tradeoff" (each number against L0, summed over layers, on a logarithmic axis; NMSE on one as well). `save`
    writes it, tradeoff.csv and reports.json.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    table: DataFrame
    """One row for each transcoder; columns name, kind (neurons, PLT, CLT, or span n), d_transcoder, and of its report
    `COLUMNS` and the graph numbers `GRAPH_COLUMNS`."""

    reports: dict[str, EvaluationReport]
    """The whole report of each by name."""

    def _draw(self, name: str) -> Figure:
        return _draw_tradeoff(self.table)

    def _write_numbers(self, folder: Path) -> None:
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        self.table.to_csv(folder / "tradeoff.csv", index=False)
        (folder / "reports.json").write_text(json.dumps(reports, indent=2, allow_nan=False) + "\n")

    def _in_short(self) -> str:
        return f"{len(self.table)} transcoders: {', '.join(map(str, self.table['name']))}"

    def _tables(self) -> dict[str, DataFrame]:
        return {"sparsity against fidelity": self.table}


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
    max_tokens: int | None = 65_536,
    context_size: int | None = None,
    n_graphs: int = 8,
    graph_tokens: int = 32,
    max_unexplored: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tradeoff:
    """Evaluate transcoders of one model, and its own neurons at some thresholds, on the same text and prompts.

    Args:
        model: a HookedTransformer; a TransformerBridge where no neurons are asked for.
        dataset: held-out text, as `evaluate` takes it.
        transcoders: CLTs and PLTs by name.
        neuron_l0s: active neurons a layer that thresholds are to let through (`thresholded_neurons`). These are found
            on the first tokens of the same text; only one number a layer is fitted.
        max_tokens, context_size, n_graphs, graph_tokens, max_unexplored, seed: as for `evaluate`.
        progress: show bars where it takes longer than 2 s.

    Raises:
        ConfigError: there is nothing to compare, or an L0 out of range.
        ModelUnsupported: neurons are asked for of a model whose MLPs are not of plain neurons.
        TlCltError: as `evaluate`.
    """
    candidates: dict[str, CrossLayerTranscoder] = dict(transcoders)
    if not candidates and not neuron_l0s:
        raise ConfigError("There is nothing to compare: give transcoders, or L0s of neurons.")
    for clt in candidates.values():
        check_fit(model, clt)
    prompts = read_held_out(model, dataset, max_tokens, context_size)
    if neuron_l0s:
        text = up_to(held_out_prompts(model, dataset, context_size), THRESHOLD_TOKENS)
        found = thresholded_neurons(model, batches(model, text), neuron_l0s)
        candidates |= {f"neurons-l0-{l0:g}": neurons for l0, neurons in found.items()}
    reports, rows = {}, []
    for name, clt in tqdm(candidates.items(), desc="Comparing", unit=" transcoders", delay=2.0, disable=not progress):
        reports[name] = evaluate(
            model,
            clt,
            prompts,
            max_tokens=max_tokens,
            context_size=context_size,
            n_graphs=n_graphs,
            graph_tokens=graph_tokens,
            max_unexplored=max_unexplored,
            seed=seed,
            progress=False,
        )
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


PANELS = {
    "nmse": "NMSE",
    "top1_agreement": "same top token",
    "replacement": "replacement score",
    "completeness": "completeness score",
    "path_length": "path length (edges)",
}
SMALLEST_NMSE = 1e-6
COLOURS = {"neurons": GREY, "PLT": PALETTE[1], "CLT": PALETTE[0]}


def _draw_tradeoff(table: DataFrame) -> Figure:
    """Lines join transcoders of one kind and size; colours are kinds, markers sizes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    markers = dict(zip(sorted(table["d_transcoder"].unique()), cycle("os^Dv*P"), strict=False))
    for panel, (column, label) in zip(axes, PANELS.items(), strict=False):
        for kind, size in table[["kind", "d_transcoder"]].drop_duplicates().itertuples(index=False):
            line = table.query("kind == @kind and d_transcoder == @size").sort_values("l0_sum_over_layers")
            name = f"{kind}, {size} a layer"
            values = line[column].astype(float)
            panel.plot(
                line["l0_sum_over_layers"],
                values,
                marker=markers[size],
                color=COLOURS.get(kind, PALETTE[2]),
                label=name,
            )
        panel.set(xscale="log", xlabel="L0 (active features a token, sum over layers)", ylabel=label)
        # Powers of ten alone are too few for most ranges of L0, and names of all minor ticks run into each other.
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_yscale("log")
    # Below lies rounding, of neurons that all pass.
    figure.axes[0].set_ylim(bottom=max(figure.axes[0].get_ylim()[0], SMALLEST_NMSE))
    figure.axes[-1].axis("off")
    figure.axes[-1].legend(*figure.axes[0].get_legend_handles_labels(), loc="center")
    return figure


class ThresholdedNeurons(CrossLayerTranscoder):
    """Each neuron a feature that writes to its own layer (span 1): a neuron of which |activation| is above its
    threshold keeps its activation, others are 0. With all thresholds below 0 it is the model's MLPs exactly."""

    def __init__(self, model: HookedModel, threshold: Float[Tensor, "n_layers d_mlp"]) -> None:
        """Take the model's neurons.

        Raises:
            ModelUnsupported: the MLPs are not of plain neurons, as gated ones.
        """
        layers = [neuron_weights(model, layer) for layer in range(model.cfg.n_layers)]
        cfg = CrossLayerTranscoderConfig(
            n_layers=model.cfg.n_layers,
            d_model=model.cfg.d_model,
            d_transcoder=layers[0].W_in.shape[1],
            span=1,
            activation="jumprelu",
            input_hook=NORMALISED,
            model_name=model_name(model),
            dtype=str(dtype_of(model)).removeprefix("torch."),
        )
        super().__init__(cfg)
        self.act_fns = [layer.act_fn for layer in layers]
        with torch.no_grad():
            self.W_enc.copy_(torch.stack([layer.W_in for layer in layers]))
            self.b_enc.copy_(torch.stack([layer.b_in for layer in layers]))
            self.b_dec.copy_(torch.stack([layer.b_out for layer in layers]))
            assert self.threshold is not None
            self.threshold.copy_(threshold.to(self.W_enc))
            for source, layer in enumerate(layers):
                self.W_dec[source].copy_(layer.W_out[:, None])
        self.requires_grad_(False)

    def activate(
        self, hidden_pre: Float[Tensor, "*batch d_transcoder"], layer: int
    ) -> Float[Tensor, "*batch d_transcoder"]:
        """The neurons' own activation function, and 0 up to the threshold."""
        assert self.threshold is not None
        acts = self.act_fns[layer](hidden_pre)
        return acts * (acts.abs() > self.threshold[layer])


@torch.no_grad()
def thresholded_neurons(
    model: HookedModel, batches: Iterable[TokenBatch], l0s: Sequence[float | int]
) -> dict[float | int, ThresholdedNeurons]:
    """For each L0 (mean per layer), thresholds that let about so many neurons a layer through on some text.

    What a neuron writes, |activation| * ||W_out||, is compared with one number a layer, a quantile over the text.

    Args:
        batches: text on which the thresholds are found; position 0 is left out.

    Raises:
        ModelUnsupported: the MLPs are not of plain neurons.
        ConfigError: an L0 is not between 0 and the number of neurons.
    """
    layers = range(model.cfg.n_layers)
    weights = [neuron_weights(model, layer) for layer in layers]
    d_mlp = weights[0].W_in.shape[1]
    for l0 in l0s:
        if not 0 < l0 <= d_mlp:
            raise ConfigError(f"An L0 of {l0} is asked for, but a layer has {d_mlp} neurons: give 1 to {d_mlp}.")
    names = {block_hook(layer, NORMALISED) for layer in layers}
    with user_hooks_aside(model):
        caches = [run_with_cache(model, tokens, lambda name: name in names)[1] for tokens in batches]
    norms = torch.stack([layer.W_out.norm(dim=-1) for layer in weights])
    limits: dict[float | int, list[Tensor]] = {l0: [] for l0 in l0s}
    for layer in layers:
        w = weights[layer]
        x = torch.cat([cache[block_hook(layer, NORMALISED)][:, 1:].flatten(0, 1) for cache in caches])
        written = (w.act_fn(x @ w.W_in + w.b_in).abs() * norms[layer]).flatten().sort(descending=True).values
        for l0, found in limits.items():
            count = round(l0 * len(x))
            found.append(written[count] if count < len(written) else -torch.ones_like(written[0]))
    return {
        l0: ThresholdedNeurons(model, torch.stack(found)[:, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny))
        for l0, found in limits.items()
    }
