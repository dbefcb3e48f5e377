"""Tracing in the order of influence: what is kept up to date, what is bounded, what is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.attribution.helpers import TOKENS
from tl_clt import CrossLayerTranscoder, NodeKind, attribute
from tl_clt.attribution.attribute import Expansion
from tl_clt.transcoder.decoders import LazyDecoders


@pytest.mark.parametrize("keep_edges", [None, 0.9])
def test_visits_kept_up_to_date_are_those_computed_anew(model, clt, graph, monkeypatch, keep_edges):
    rounds, trace = [], Expansion.trace

    def check(self, features, batch_size, bar, ranked):
        n_traced = trace(self, features, batch_size, bar, ranked)
        rows = graph.adjacency * self.expanded[:, None]
        if keep_edges is None:
            whole = graph.logit_probs.sum()
            wanted = (graph.logit_weights + replace(graph, adjacency=rows).influence()) / whole
            torch.testing.assert_close(self.visits, wanted, rtol=1e-12, atol=1e-15)
        rounds.append(float(self.open_shares().sum()))
        return n_traced

    monkeypatch.setattr(Expansion, "trace", check)
    part = attribute(model, clt, TOKENS, max_unexplored=0.02, batch_size=1, keep_edges=keep_edges)
    assert len(rounds) > 1
    assert rounds[-1] == pytest.approx(part.shares().unexplored, rel=1e-9)
    assert rounds[-1] <= 0.02 < rounds[-2]


@pytest.mark.parametrize("bound", [0.3, 0.1, 0.01])
def test_the_bound_holds_at_every_node(model, clt, graph, bound):
    part = attribute(model, clt, TOKENS, max_unexplored=bound, batch_size=2)
    assert part.unexplored <= bound
    whole, ours = (g.influence() / g.logit_probs.sum() for g in (graph, part))
    assert (whole - ours).abs().max() <= part.unexplored + 1e-12
    for definition in ("paper", "circuit-tracer"):
        low, high = part.scores(definition).replacement_bounds
        assert low - 1e-12 <= graph.scores(definition).replacement <= high + 1e-12
        # Both numerator and denominator may lack as much as is unexplored.
        assert high - low <= part.unexplored / (graph.shares().token + graph.shares().error) + 1e-12


def test_no_more_is_traced_than_the_bound_asks_for(model, clt, graph):
    counts = [
        int(attribute(model, clt, TOKENS, max_unexplored=bound, batch_size=64).expanded.sum())
        for bound in (0.9, 0.5, 0.2, 0.05, 0.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] <= int(graph.expanded.sum())


def test_lazy_decoders_read_active_features_alone(model, clt, graph, tmp_path, monkeypatch):
    clt.save_pretrained(tmp_path / "clt")
    lazy = CrossLayerTranscoder.from_pretrained(tmp_path / "clt", lazy_decoder=True)
    read, rows = [], LazyDecoders.rows

    def note(self, source, features):
        read.extend((source, int(f)) for f in features)
        return rows(self, source, features)

    found = attribute(model, lazy, TOKENS)
    monkeypatch.setattr(LazyDecoders, "rows", note)
    again = attribute(model, lazy, TOKENS)
    torch.testing.assert_close(found.adjacency, graph.adjacency, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.adjacency, graph.adjacency, rtol=1e-12, atol=1e-12)
    features = graph.nodes.take(graph.nodes.where(NodeKind.FEATURE))
    active = set(zip(features.layer.tolist(), features.index.tolist(), strict=True))
    assert set(read) == active
    # Once to reconstruct the MLPs, once for the edges.
    assert len(read) == 2 * len(active)
