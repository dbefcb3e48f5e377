"""What commands print of their results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tl_clt.cli.app import console, errors

if TYPE_CHECKING:
    from tl_clt.attribution import AttributionGraph
    from tl_clt.interventions import InterventionEffect
    from tl_clt.lens import HookedModel
    from tl_clt.transcoder import CrossLayerTranscoder


def show_graph(
    graph: AttributionGraph, pruned: AttributionGraph, model: HookedModel, clt: CrossLayerTranscoder
) -> None:
    """Print a pruned graph as a tree, and the scores of the whole."""
    import torch

    from tl_clt.features import promoted_tokens
    from tl_clt.viewer import graph_tree
    from tl_clt.viewer.tables import graph_table

    def label(layer: int, feature: int) -> str:
        words = promoted_tokens(model, clt, layer, torch.tensor([feature], device=clt.W_enc.device))[0]
        return "promotes " + ", ".join(w.strip() for w in words)

    console.print(
        "Each line: the share of the input of the node above it, the node, and the tokens it promotes most directly.",
        style="dim",
    )
    console.print(graph_tree(pruned, label=label))
    console.print(graph_table(graph, pruned))


def show_effect(effect: InterventionEffect, top: int) -> None:
    """Print the tokens whose probability changed most."""
    from tl_clt.viewer.tables import effect_table

    for inactive in effect.inactive:
        errors.print(f"Note: {inactive}. Scaling it does nothing.", markup=False)
    console.print(effect_table(effect, top))


def write(graph: AttributionGraph, output: Path) -> None:
    graph.save(output)
    console.print(f"The whole graph is in {output}: tl_clt.AttributionGraph.load('{output}') reads it.")
