"""Seeing a graph."""

from tl_clt.viewer.html import page_data, page_html, save_html
from tl_clt.viewer.notebook import GraphView
from tl_clt.viewer.text import graph_tree, node_name

__all__ = ["GraphView", "graph_tree", "node_name", "page_data", "page_html", "save_html"]
