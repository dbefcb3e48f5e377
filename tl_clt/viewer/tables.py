"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pandas import DataFrame, isna
from rich.markup import escape
from rich.table import Table

from tl_clt.attribution import AttributionGraph
from tl_clt.benchmark import BenchmarkReport
from tl_clt.evaluation import EvaluationReport, FaithfulnessCurves
from tl_clt.features import FeatureRecord, FeatureStore
from tl_clt.interventions import InterventionEffect
from tl_clt.viewer.story import Group


def graph_table(graph: AttributionGraph, pruned: AttributionGraph) -> Table:
    """Sizes and scores of a graph, with their bounds where something of it is unknown."""
    scores, shares = graph.scores(), graph.shares()
    table = Table(title="The graph", title_justify="left", show_header=False)
    table.add_row("nodes and edges", f"{len(graph.nodes)} and {graph.n_edges}")
    table.add_row("shown (pruned)", f"{len(pruned.nodes)} and {pruned.n_edges}")
    table.add_row("replacement score", f"{scores.replacement_text()} (tokens against errors)")
    table.add_row("completeness score", f"{scores.completeness_text()} (inputs that are not errors)")
    table.add_row("influence from biases", f"{shares.bias:.3f}, positions {shares.position:.3f}")
    if shares.unexplored > 0:
        table.add_row("influence not traced", f"{shares.unexplored:.3f}")
    if shares.dropped > 0:
        table.add_row("influence along edges not held", f"{shares.dropped:.3f}")
    table.add_row("unknown once pruned", f"{pruned.unexplored:.3f} of influence")
    if pruned.info.get("thresholds_out_of_reach"):
        names = " and ".join(pruned.info["thresholds_out_of_reach"])
        table.add_row("kept for want of knowledge", f"all there is: what is held cannot be sure to reach {names}")
    return table


def group_table(groups: list[Group], graph: AttributionGraph, features: FeatureStore) -> Table:
    """Groups of a graph's features, with what their labels are worth."""
    table = Table("meaning", "at", "layers", "features", "influence", "score", "random", title_justify="left")
    table.title = "Features by what their labels say there. Score: balanced accuracy of the whole label on other text"
    for group in groups:
        records = [features[node.layer, node.index] for node in group.nodes]
        first, last = group.layers
        table.add_row(
            escape(group.meaning),
            escape(graph.prompt_tokens[group.pos].strip()),
            str(first) if first == last else f"{first} to {last}",
            ", ".join(f"{node.layer}.{node.index}" for node in group.nodes),
            f"{group.share:.0%}",
            _mean_of([record.label_score for record in records]),
            _mean_of([record.label_score_random for record in records]),
        )
    return table


def feature_table(records: list[FeatureRecord]) -> Table:
    """Features with their labels and what these are worth."""
    table = Table("feature", "label", "score", "nearest", "random", "density", "maximum", "promotes")
    table.title, table.title_justify = "The features that write most", "left"
    for record in records:
        table.add_row(
            f"{record.layer}.{record.feature}",
            escape(record.label or ""),
            *(_mean_of([s]) for s in (record.label_score, record.label_score_nearest, record.label_score_random)),
            f"{record.density:.2%}",
            f"{record.max_activation:.3g}",
            escape(", ".join(pair.token.strip() for pair in record.top_logits[:3])),
        )
    return table


def label_table(summary: Mapping[str, Any]) -> Table:
    """What a store's labels score by layer, beside those of a random dictionary (`FeatureStore.label_summary`)."""
    table = Table("layer", "labels", "score", "random dictionary", "nearest", "random dictionary, nearest")
    table.title = f"Balanced accuracy of labels by {escape(summary['labeller'])} on held-out text (0.5 is chance)"
    table.title_justify = "left"
    names = ("score", "score_random", "score_nearest", "score_random_nearest")
    for layer in summary["layers"]:
        table.add_row(str(layer["layer"]), str(layer["n_labels"]), *(_mean_of([layer[name]]) for name in names))
    return table


def _mean_of(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else ""


def effect_table(effect: InterventionEffect, top: int) -> Table:
    """The tokens whose probability an intervention changed most."""
    table = Table("token", "before", "after", "change", title="Probability of the next token", title_justify="left")
    for row in effect.top_changes(top).to_dict("records"):
        table.add_row(row["token"], f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['change']:+.4f}")
    return table


def evaluation_table(report: EvaluationReport) -> Table:
    """What a report says of the CLT as a whole."""
    title = f"The CLT in place of the MLPs, on {report.n_prompts} held-out prompts ({report.n_tokens} tokens)"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("explained variance", f"{report.explained_variance:.3f} (mean over layers)")
    table.add_row("NMSE", f"{report.nmse:.3f} (squared error / squared output, mean over layers)")
    l0 = f"{report.l0_mean_per_layer:.1f} a layer, {report.l0_sum_over_layers:.1f} over all layers"
    table.add_row("active features (L0)", l0)
    table.add_row("dead features", f"{report.dead_share:.1%} never active on these {report.n_tokens} tokens")
    table.add_row("same top token", f"{report.top1_agreement:.1%} with all MLPs replaced")
    if report.top1_agreement_uncertain is not None:
        found = f"{report.top1_agreement_uncertain:.1%} of {report.n_uncertain} tokens found with p < 0.8"
        table.add_row("found by both", found)
    table.add_row("KL divergence", f"{report.kl_divergence:.4f} nats")
    if report.cross_entropy_recovered is not None:
        losses = (report.cross_entropy, report.cross_entropy_replaced, report.cross_entropy_ablated)
        model, replaced, ablated = (f"{loss:.3f}" for loss in losses)
        recovered = f"{report.cross_entropy_recovered:.1%} recovered"
        table.add_row("cross-entropy", f"model {model}, replaced {replaced}, MLPs zeroed {ablated}: {recovered}")
    shares = ", ".join(f"{share:.0%}" for share in report.written_share_by_distance)
    table.add_row("written 0, 1, ... layers ahead", shares)
    means = report.graph_means
    if means is not None:
        table.add_row(
            "graphs", f"{len(report.graphs)} prompts of at most {max(g.n_tokens for g in report.graphs):.0f} tokens"
        )
        table.add_row("replacement score", f"{means.replacement:.3f}")
        table.add_row("completeness score", f"{means.completeness:.3f}, pruned {means.completeness_pruned:.3f}")
        table.add_row("path length", f"{means.path_length:.2f} edges")
        table.add_row("nodes", f"{means.n_nodes:.0f}, pruned {means.n_nodes_pruned:.0f}")
    if report.graphs_missing is not None:
        table.add_row("graphs missing", escape(report.graphs_missing))
    return table


def layer_table(report: EvaluationReport) -> Table:
    """What it says of each layer."""
    names = ("explained variance", "NMSE", "L0", "dead features")
    table = Table("layer", *names, title="By layer", title_justify="left")
    columns = (report.explained_variance_per_layer, report.nmse_per_layer, report.l0_per_layer)
    for layer, (explained, nmse, l0, dead) in enumerate(zip(*columns, report.dead_share_per_layer, strict=True)):
        table.add_row(str(layer), f"{explained:.3f}", f"{nmse:.3f}", f"{l0:.1f}", f"{dead:.1%}")
    return table


TRADEOFF_COLUMNS = {
    "name": "name",
    "l0_sum_over_layers": "L0 sum",
    "l0_mean_per_layer": "mean",
    "nmse": "NMSE",
    "top1_agreement": "top-1",
    "top1_agreement_uncertain": "p<.8",
    "replacement": "repl.",
    "completeness": "compl.",
    "path_length": "path",
}


def tradeoff_table(table: DataFrame) -> Table:
    """The main columns of a trade-off table."""
    title = (
        f"On {table['n_tokens'].iloc[0]} held-out tokens: L0 (sum over layers, mean per layer), NMSE, top-1 agreement"
    )
    title += " (all; found with p < 0.8), replacement, completeness, path length"
    shown = Table(*TRADEOFF_COLUMNS.values(), title=title, title_justify="left", padding=(0, 0))
    for row in table.to_dict("records"):
        shown.add_row(*(_cell(row[column]) for column in TRADEOFF_COLUMNS))
    return shown


CURVE_SHARES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of the nodes or edges, at which a table says how faithful circuits are."""


def curves_table(report: FaithfulnessCurves) -> Table:
    """Areas of faithfulness curves, and some of their points."""
    info = report.info
    title = f"Circuits of {report.table['prompt'].nunique()} prompts, ablated to {info['ablated_to']}; metric"
    intervals = "" if report.areas["area_low"].isna().all() else ", 95% intervals"
    title += f" {info['metric']}, errors {info['errors']}. area under f and distance from 1{intervals}; f by share"
    title += f" of {info.get('level', 'nodes')}; number: of all, and of the first share whose f is .9 (for .9)"
    curves, areas = report.curves, report.areas.to_dict("records")
    table = Table("", *(f"{escape(row['transcoder'])}\n{row['ranking']}" for row in areas), padding=(0, 1))
    table.title, table.title_justify = title, "left"
    for name in ("area", "distance"):
        table.add_row(name, *(_between(row[name], row[f"{name}_low"], row[f"{name}_high"], 3) for row in areas))
    of_each = [
        curves[(curves["transcoder"] == row["transcoder"]) & (curves["ranking"] == row["ranking"])] for row in areas
    ]
    points = [of.set_index("share")["faithfulness"] for of in of_each]
    for share in (share for share in CURVE_SHARES if share in set(curves["share"])):
        table.add_row(f"f({share:g})", *(f"{of[share]:.2f}" for of in points))
    table.add_row("f(1)", *(f"{row['whole']:.2f}" for row in areas))
    table.add_row("number", *(f"{row['n_nodes']:,.0f}" for row in areas))
    table.add_row("for .9", *("-" if isna(row["n_for_90"]) else f"{row['n_for_90']:,.0f}" for row in areas))
    return table


BENCHMARK_COLUMNS = {
    "l0": "L0",
    "answers_kept": "right",
    "accuracy": "told",
    "swap": "swap",
    "hop_recall": "hop recall",
    "hops_shown": "hops shown",
    "precision": "prec.",
}


def benchmark_table(report: BenchmarkReport) -> Table:
    """What transcoders show of known hops: means over seeds, of hop recall and hops shown with the range."""
    summary = report.summary
    # Organisms have no number of hops shown: where they are the only judges, it has no column.
    columns = {
        name: label for name, label in BENCHMARK_COLUMNS.items() if name in summary and summary[name].notna().any()
    }
    table = Table("judge", "judged", "at", *columns.values(), padding=(0, 0))
    table.title = "Known hops, means over seeds (least to most below). at: lambda, k or share of neurons kept; L0:"
    table.title += " active features, all layers; right: answers with it in place of the MLPs; told: variables, from"
    table.title += " their features; swap: answers that follow it; hop recall: variables with both; hops shown: paths,"
    table.title += " of those there are; prec.: features in graphs that are functions of what the program has (of"
    table.title += " organisms, features at the last position)"
    table.title_justify = "left"
    for row in summary.to_dict("records"):
        cells = []
        for name in columns:
            cell = "" if isna(row[name]) else f"{row[name]:.{1 if name == 'l0' else 2}f}"
            least, most = row[f"{name}_least"], row[f"{name}_most"]
            cells.append(f"{cell}\n{least:.2f} to {most:.2f}" if name.startswith("hop") and least < most else cell)
        kind, at = row["kind"], f"{'k' if row['activation'] == 'topk' else 'λ'} {row['sparsity']:g}"
        at = {"neurons": f"{row['sparsity']:.0%}", "untrained": ""}.get(kind, at)
        judged = {"plt": "PLT", "clt": "CLT", "untrained": "chance"}.get(kind, kind)
        table.add_row(row["judge"], judged, at, *cells)
    return table


def _between(value: float, low: float, high: float, digits: int) -> str:
    """A number, with what it lies between where that is known."""
    if isna(value):
        return ""
    return f"{value:.{digits}f}" if isna(low) else f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if isna(value) else f"{value:.3g}"
    return "" if value is None else str(value)
