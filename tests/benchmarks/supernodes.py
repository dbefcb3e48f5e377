"""Supernodes against what is known, and against what they do: `python -m tests.benchmarks.supernodes` prints tables.

1. Groups against the variables of circuits known by construction, and of atlas's two-hop task. A neuron's variable is
   the one that it writes; a trained CLT's feature's the one, of those its layer computes, whose arguments explain at
   least .9 of its activation over all prompts; of atlas's features, at a position, the coarsest of relation, state,
   fact and city that does. Features of none are grouped, but not counted. Beside them, groups by position, by position
   and layer, and shuffled groups.
2. Atlas: influence and predictions of groups against joint ablation, beside groups of chance.
3. Atlas: nodes that keep a share of the measured behaviour, beside what fixed thresholds keep and random orders take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from pandas import DataFrame, concat
from rich.console import Console

from tl_clt import (
    AttributionGraph,
    NodeKind,
    attribute,
    feature_acts,
    find_supernodes,
    load_organism,
    measure_supernodes,
    prune_to_behaviour,
)
from tl_clt.attribution import Nodes, Supernodes
from tl_clt.benchmark.hops import PURITY, explained_by, find_group, neurons_as_transcoder
from tl_clt.benchmark.train import train_on_circuit
from tl_clt.evaluation import find_consensus
from tl_clt.organisms import known_circuits, load_circuit, organism_tasks
from tl_clt.organisms.interchange import as_batch

console = Console(width=160)
SHUFFLES = 20
KNOWN_OF_ATLAS = ("relation", "state", "fact", "city")
"""From the coarsest on."""
MOST_PROMPTS = 81
"""Of a circuit, for its graph."""
SHOWN_BY_VARIABLE = ("edges", "edges and responses", "position and layer")


def adjusted_rand(one: Sequence, other: Sequence) -> float:
    """Hubert and Arabie 1985: 1 for the same groups, 0 on average for groups of chance of the same sizes."""
    table = np.zeros((len(set(one)), len(set(other))))
    for a, b in zip(*(np.unique(x, return_inverse=True)[1] for x in (one, other)), strict=True):
        table[a, b] += 1

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = rows * columns / pairs(np.array([len(one)]))
    most = (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


class Agreement(NamedTuple):
    """Of groups with a known variable: of the group that has most in common with it."""

    purity: float
    recall: float


def best_groups(known: Sequence[str], groups: Sequence) -> dict[str, Agreement]:
    """For each variable, purity and recall of the group for which their harmonic mean is largest."""
    found = {}
    for variable in sorted(set(known)):
        of = {i for i, name in enumerate(known) if name == variable}
        sets = [{i for i, group in enumerate(groups) if group == name} for name in sorted(set(groups))]
        best = max(sets, key=lambda members: 2 * len(members & of) / (len(members) + len(of)))
        found[variable] = Agreement(len(best & of) / len(best), len(best & of) / len(of))
    return found


def rows_of(
    graph: AttributionGraph, known: dict[int, str], acts: torch.Tensor, among: list[int]
) -> Iterator[dict[str, Any]]:
    """What each way of grouping has in common with the known variables of some nodes; for each variable, and of all.

    Args:
        graph: of one prompt, or several.
        known: the variable of each node that is judged.
        acts: over prompts [n_prompts, pos, n_layers, d_transcoder], which are the features' responses.
        among: the nodes that are grouped.
    """
    judged = [number for number in among if number in known]
    truth = [known[number] for number in judged]
    if len(set(truth)) < 2 or len(set(truth)) == len(truth):
        return  # nothing to be told apart, or nothing that belongs together
    nodes = graph.nodes.take(graph.nodes.where(NodeKind.FEATURE))
    responses = acts[:, nodes.pos, nodes.layer, nodes.index].T.contiguous()
    place = [f"{int(graph.nodes.pos[n])} {int(graph.nodes.layer[n])}" for n in judged]
    n_groups = max(len(set(truth)), len({int(graph.nodes.pos[n]) for n in among}))
    ways: dict[str, dict[str, Any]] = {
        "edges": {},
        "edges, signed": {"signed": True},
        "edges, known number": {"n_groups": n_groups},
        "signed, known number": {"n_groups": n_groups, "signed": True},
        "responses": {"responses": responses, "response_weight": 1.0},
        "edges and responses": {"responses": responses},
        "both, known number": {"responses": responses, "n_groups": n_groups},
    }
    found = {name: group_of(find_supernodes(graph, among, **options), judged) for name, options in ways.items()}
    found |= {"position": [at.split()[0] for at in place], "position and layer": place}
    chooser = np.random.default_rng(len(judged))
    for name, groups in found.items():
        mixed = [chooser.permutation(groups).tolist() for _ in range(SHUFFLES)]
        chance = [best_groups(truth, groups) for groups in mixed]
        of_all = {
            "groups by": name,
            "features": len(judged),
            "variables": len(set(truth)),
            "groups": len(set(groups)),
            "ARI": adjusted_rand(truth, groups),
            "ARI shuffled": float(np.mean([adjusted_rand(truth, groups) for groups in mixed])),
        }
        for variable, (purity, recall) in best_groups(truth, groups).items():
            by_chance = np.mean([of[variable] for of in chance], axis=0)
            yield {
                **of_all,
                "variable": variable,
                "purity": purity,
                "recall": recall,
                "purity shuffled": by_chance[0],
                "recall shuffled": by_chance[1],
            }


def group_of(groups: Supernodes, numbers: list[int]) -> list[str]:
    at = {number: name for name, members in groups.items() for number in members}
    return [at[number] for number in numbers]


def join(graphs: Sequence[AttributionGraph]) -> AttributionGraph:
    """The graph of several prompts of one length: nodes are the same that have one kind, layer, position and feature,
    tokens those of one position, and edges are means over prompts, 0 where an end is not active. The target is each
    prompt's own answer."""
    numbers: dict[tuple[int, ...], int] = {}
    places = []
    for graph in graphs:
        nodes = graph.nodes
        features = nodes.is_kind(NodeKind.FEATURE)
        each = torch.stack([nodes.kind, nodes.layer, nodes.pos, nodes.index * features], dim=1).tolist()
        places.append([numbers.setdefault(tuple(place), len(numbers)) for place in each])
    ordered = sorted(numbers)
    rank = torch.tensor([ordered.index(place) for place in numbers])
    n = len(ordered)
    adjacency, activation = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for graph, place in zip(graphs, places, strict=True):
        at = rank[place]
        adjacency[at[:, None], at] += graph.adjacency.double() / len(graphs)
        activation[at] += graph.nodes.activation.double() / len(graphs)
    nodes = Nodes(*torch.tensor(ordered).unbind(dim=1), activation)
    return AttributionGraph(
        nodes=nodes,
        adjacency=adjacency,
        expanded=nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT),
        tokens=graphs[0].tokens,
        prompt_tokens=[f"position {i}" for i in range(len(graphs[0].tokens))],
        logit_probs=torch.ones(1, dtype=torch.float64),
        logit_tokens=["answer"],
        info={"n_layers": graphs[0].info["n_layers"]},
    )


def on_circuits(n_seeds: int) -> DataFrame:
    """All prompts of each circuit together: with one neuron a value, one prompt's graph has nothing to group."""
    rows = []
    for name in known_circuits():
        circuit = load_circuit(name)
        at = circuit.answer_position
        clts = {"neurons": [neurons_as_transcoder(circuit)]}
        clts["trained CLT"] = [train_on_circuit(circuit, circuit.model.cfg.n_layers, 1.0, s) for s in range(n_seeds)]
        for kind, clt in ((kind, clt) for kind, several in clts.items() for clt in several):
            acts = feature_acts(circuit.model, clt, circuit.prompts)
            of: dict[tuple[int, int], str] = {}
            for variable in circuit.variables:
                # A neuron is of the variable that it writes, and writes nothing else.
                written = clt.W_dec[variable.layer][:, 0] @ variable.subspace.T
                mine = written.norm(dim=1) > 1e-6 if kind == "neurons" else find_group(variable, acts[:, at])
                for feature in torch.nonzero(mine).flatten().tolist():
                    of.setdefault((variable.layer, feature), variable.name)
            graphs = [
                attribute(circuit.model, clt, prompt, [int(answer)], 1, bos="features", progress=False)
                for prompt, answer in list(zip(circuit.prompts, circuit.answers, strict=True))[:MOST_PROMPTS]
            ]
            graph = join(graphs)
            nodes = graph.nodes
            among = torch.nonzero(nodes.is_kind(NodeKind.FEATURE) & (nodes.pos == at)).flatten().tolist()
            places = {n: (int(nodes.layer[n]), int(nodes.index[n])) for n in among}
            known = {n: of[place] for n, place in places.items() if place in of}
            about = {"of": f"{name}, {kind}", "graph": len(rows)}
            rows += [{**about, **found} for found in rows_of(graph, known, acts, among)]
    return DataFrame(rows)


def on_atlas(n_graphs: int) -> DataFrame:
    """One prompt after the other, and all of them together. A variable is one at a position."""
    model, clt = load_organism("atlas")
    task = organism_tasks("atlas")["two_hop"]
    told = task.cases(400, held_out=False)
    acts = feature_acts(model, clt, as_batch(model, task, told))
    explained = {}
    for name in KNOWN_OF_ATLAS:
        values = [case.values[name] for case in told]
        codes = torch.tensor([sorted(set(values)).index(value) for value in values])
        explained[name] = explained_by(acts.flatten(1), codes).unflatten(0, acts.shape[1:]) >= PURITY
    cases = task.cases(n_graphs, held_out=True)
    graphs = [attribute(model, clt, case.prompt, [case.answer], progress=False) for case in cases]
    rows = []
    for number, graph in enumerate([*graphs, join(graphs)]):
        nodes = graph.nodes
        among = torch.nonzero(graph.prune_masks().nodes & nodes.is_kind(NodeKind.FEATURE)).flatten().tolist()
        known = {}
        for n in among:
            place = (int(nodes.pos[n]), int(nodes.layer[n]), int(nodes.index[n]))
            name = next((name for name in KNOWN_OF_ATLAS if bool(explained[name][place])), None)
            if name is not None:
                known[n] = f"{name} at {place[0]}"
        of = "atlas, each prompt" if number < len(graphs) else "atlas, all prompts"
        rows += ({"of": of, "graph": number, **found} for found in rows_of(graph, known, acts, among))
    return DataFrame(rows)


def effects(n_graphs: int, n_random: int) -> DataFrame:
    """Agreement with joint ablation over all groups of all prompts; random groups of the whole and of the pruned
    graph's features."""
    model, clt = load_organism("atlas")
    tables, scores = [], []
    for number, case in enumerate(organism_tasks("atlas")["two_hop"].cases(n_graphs, held_out=True)):
        graph = attribute(model, clt, case.prompt, [case.answer], progress=False)
        for which, of in (("whole graph", graph), ("pruned graph", graph.prune())):
            among = graph.prune_masks().nodes if of is graph else None
            options = {"n_random": n_random, "seed": number, "progress": False}
            report = measure_supernodes(model, clt, of, find_supernodes(of, among), **options)
            tables.append(report.table.assign(control=which, prompt=number))
            scores.append(report.scores.assign(control=which))
    table = concat(tables)
    rows = []
    for (which, role), of in table.groupby(["control", "role"]):
        size = of["joint"].abs()
        row = {"control of": which, "role": role, "groups": len(of), "features": of["n_features"].mean()}
        row |= {"|joint|": size.mean(), "|singles - joint|": (of["singles"] - of["joint"]).abs().mean()}
        row |= {"influence": of["influence"].mean(), "influence rho": of["influence"].corr(size, method="spearman")}
        row |= {f"{name} r": of[name].corr(of["joint"]) for name in ("direct", "total", "singles")}
        rows.append(row | {"answers kept": of["answer_kept"].mean()})
    whole = concat(scores).groupby(["control", "role"])[["n_features", "replacement", "completeness"]].mean()
    console.print(f"Scores of the subgraph of all groups\n{whole.round(3).to_string()}\n")
    return DataFrame(rows)


def behaviour(n_graphs: int) -> DataFrame:
    """Nodes of whole graphs that keep a share of the behaviour."""
    model, clt = load_organism("atlas")
    cases = organism_tasks("atlas")["two_hop"].cases(n_graphs, held_out=True)
    graphs = [attribute(model, clt, case.prompt, [case.answer], progress=False) for case in cases]
    rows, at_share = [], {}
    for share in (0.5, 0.8, 0.9, 0.95, 0.99):
        found = [prune_to_behaviour(model, clt, graph, share) for graph in graphs]
        at_share[share] = [of.graph for of in found]
        n_random = [math.nan if of.n_random is None else of.n_random for of in found]
        rows.append(
            {
                "share": share,
                "reached": np.mean([of.reached for of in found]),
                "f": np.mean([of.faithfulness for of in found]),
                "nodes kept": np.mean([of.n_kept for of in found]),
                "at random": np.nanmean(n_random),
                "of": np.mean([of.n_nodes for of in found]),
                "threshold": np.mean([of.node_threshold for of in found]),
                "least": min(of.node_threshold for of in found),
                "greatest": max(of.node_threshold for of in found),
            }
        )
        for least in (0.5, 0.8):
            rows[-1][f"features in {least:.0%} of graphs"] = len(find_consensus(at_share[share], least, positions=True))
    return DataFrame(rows)


def main(
    n_graphs: Annotated[int, typer.Option(help="Prompts of atlas that are traced.")] = 16,
    n_random: Annotated[int, typer.Option(help="Groups of chance beside each.")] = 4,
    seeds: Annotated[int, typer.Option(help="CLTs trained on each circuit.")] = 3,
) -> None:
    """Print the three tables."""
    torch.set_num_threads(1)
    found = concat([on_circuits(seeds), on_atlas(n_graphs)])
    by_graph = found.groupby(["of", "groups by", "graph"], sort=False).mean(numeric_only=True)
    means = by_graph.groupby(["of", "groups by"], sort=False).mean()
    means.insert(0, "graphs", by_graph.groupby(["of", "groups by"], sort=False).size())
    console.print(f"Groups against known variables, means over graphs\n{means.round(2).to_string()}\n")
    each = found[(found["of"] == "atlas, each prompt") & found["groups by"].isin(SHOWN_BY_VARIABLE)]
    by_variable = each.groupby(["variable", "groups by"])[["purity", "recall", "purity shuffled", "recall shuffled"]]
    console.print(f"By variable, atlas, each prompt\n{by_variable.mean().round(2).to_string()}\n")
    shown = effects(n_graphs, n_random).round(3)
    console.print(f"Groups against joint ablation, atlas\n{shown.to_string(index=False)}\n")
    console.print(f"Pruned to a share of behaviour, atlas\n{behaviour(n_graphs).round(3).to_string(index=False)}")


if __name__ == "__main__":
    typer.run(main)
