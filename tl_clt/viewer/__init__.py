"""Seeing a graph, here and in other viewers."""

from tl_clt.viewer.figures import GraphFigures, graph_figures, require_figure, save_figure
from tl_clt.viewer.formats import (
    FeatureBundles,
    load_circuit_tracer,
    load_neuronpedia,
    load_neuronpedia_features,
    save_circuit_tracer,
    save_circuit_tracer_features,
    save_neuronpedia,
    save_neuronpedia_features,
    upload_neuronpedia,
    upload_neuronpedia_features,
)
from tl_clt.viewer.html import page_data, page_html, save_html
from tl_clt.viewer.notebook import GraphView
from tl_clt.viewer.story import Group, Path, group_features, strongest_paths
from tl_clt.viewer.text import graph_tree, node_name

__all__ = [
    "FeatureBundles",
    "GraphFigures",
    "GraphView",
    "Group",
    "Path",
    "graph_figures",
    "graph_tree",
    "group_features",
    "load_circuit_tracer",
    "load_neuronpedia",
    "load_neuronpedia_features",
    "node_name",
    "page_data",
    "page_html",
    "require_figure",
    "save_circuit_tracer",
    "save_circuit_tracer_features",
    "save_figure",
    "save_html",
    "save_neuronpedia",
    "save_neuronpedia_features",
    "strongest_paths",
    "upload_neuronpedia",
    "upload_neuronpedia_features",
]
