"""What of an edge goes through no attention head, against sums of decoder and encoder vectors by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import NodeKind, attribute
from tl_clt.attribution import find_direct_edges
from tl_clt.errors import CLTMismatch, ConfigError


@pytest.fixture(scope="module")
def traced():
    """A CLT that reads and writes the residual stream with no norm between, in float64."""
    model = tiny_hooked("gpt2", dtype=torch.float64)
    clt = tiny_clt(model, dtype=torch.float64)
    assert clt.cfg.input_hook == "hook_resid_mid"
    graph = attribute(model, clt, random_tokens(model, pos=6)[0], progress=False)
    return model, clt, graph, find_direct_edges(graph, model, clt)


def test_edges_between_features_are_products_of_their_vectors(traced):
    _, clt, graph, direct = traced
    features = [node for node in graph.nodes if node.kind == NodeKind.FEATURE]
    tried = 0
    for target in features:
        for source in features:
            expected = 0.0
            if source.layer < target.layer and source.pos == target.pos:
                written = clt.decoder_rows(source.layer, torch.tensor([source.index]))[0]
                below = target.layer - source.layer
                vector = written[:below].sum(dim=0)
                expected = source.activation * float(vector @ clt.W_enc[target.layer, :, target.index])
                tried += 1
            assert float(direct[target.number, source.number]) == pytest.approx(expected, abs=1e-12)
    assert tried > 10


def test_edges_from_errors_and_tokens_too_and_none_between_positions(traced):
    _, clt, graph, direct = traced
    target = next(n for n in graph.nodes if n.kind == NodeKind.FEATURE and n.layer == 1)
    reads = clt.W_enc[1, :, target.index].detach()
    for kind in (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.POSITION):
        for source in (node for node in graph.nodes if node.kind == kind and node.pos != target.pos):
            assert float(direct[target.number, source.number]) == 0
    model = traced[0]
    token = next(n for n in graph.nodes if n.kind == NodeKind.TOKEN and n.pos == target.pos)
    expected = float(model.W_E[token.index].detach() @ reads)
    assert float(direct[target.number, token.number]) == pytest.approx(expected, abs=1e-12)


def test_the_last_layer_s_features_write_logits_without_attention(traced):
    _, clt, graph, direct = traced
    logits, last = graph.nodes.where(NodeKind.LOGIT), clt.cfg.n_layers - 1
    of_last = torch.nonzero(graph.nodes.is_kind(NodeKind.FEATURE) & (graph.nodes.layer == last)).flatten()
    assert torch.allclose(direct[logits][:, of_last], graph.adjacency[logits][:, of_last], atol=1e-12)
    other = ~torch.isclose(direct[logits], graph.adjacency[logits])
    assert bool(other.any())


def test_a_pruned_graph_has_the_part_of_its_edges(traced):
    model, clt, graph, direct = traced
    kept = graph.prune_masks(0.7, 0.9)
    found = find_direct_edges(graph.prune(0.7, 0.9), model, clt)
    expected = (direct * kept.edges)[kept.nodes][:, kept.nodes]
    assert torch.allclose(found, expected, atol=1e-12)


def test_other_models_and_contrastive_graphs_are_refused(traced):
    model, clt, graph, _ = traced
    other = attribute(model, clt, random_tokens(model, pos=6)[0], contrast=random_tokens(model, pos=6, seed=9)[0])
    with pytest.raises(ConfigError, match="contrastive"):
        find_direct_edges(other, model, clt)
    with pytest.raises(ConfigError, match="too old"):
        find_direct_edges(replace(graph, targets=None), model, clt)
    with pytest.raises(CLTMismatch, match="traced with"):
        find_direct_edges(graph, model, tiny_clt(model, dtype=torch.float64, seed=5))
