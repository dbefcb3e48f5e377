"""Graphs that hold the strongest edges alone, and the memory that tracing takes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.attribution.helpers import TOKENS, assert_within_bounds
from tl_clt import AttributionGraph, NodeKind, attribute, machine
from tl_clt.attribution import edges, memory
from tl_clt.attribution.attribute import Expansion
from tl_clt.attribution.edges import csr_parts
from tl_clt.errors import ConfigError, FormatError, MemoryLimit
from tl_clt.viewer.text import graph_tree


@pytest.fixture(scope="module")
def sparse(model, clt):
    return attribute(model, clt, TOKENS, keep_edges=0.9)


def test_it_holds_the_strongest_edges_and_knows_the_rest(sparse, graph):
    held = sparse.adjacency.to_dense()
    kept = held != 0
    # Traced apart, in batches that may have other sizes: float64 rounding of sums of d_model products.
    torch.testing.assert_close(held[kept], graph.adjacency[kept], rtol=1e-9, atol=1e-13)
    sizes, inputs = graph.adjacency.abs(), graph.adjacency.abs().sum(dim=1)
    rows = graph.expanded
    assert (held.abs().sum(dim=1)[rows] >= 0.9 * inputs[rows] - 1e-12).all()
    torch.testing.assert_close(held.abs().sum(dim=1) + sparse.dropped, inputs)
    weakest_kept = torch.where(kept, sizes, torch.inf).amin(dim=1)
    strongest_dropped = torch.where(kept, 0, sizes).amax(dim=1)
    assert (weakest_kept >= strongest_dropped)[rows].all()
    without_weakest = held.abs().sum(dim=1) - weakest_kept
    assert (without_weakest <= 0.9 * inputs + 1e-6 * inputs)[rows].all()
    assert kept.sum() < 0.6 * (graph.adjacency != 0).sum()


def test_what_is_dropped_bounds_the_difference_of_influence(sparse, graph):
    whole, part = graph.influence() / graph.logit_probs.sum(), sparse.influence() / graph.logit_probs.sum()
    assert 0 < sparse.unexplored < 1
    assert ((whole - part).abs() <= sparse.unexplored + 1e-12).all()
    assert sum(sparse.shares()) == pytest.approx(1)
    assert_within_bounds(graph, sparse)


def test_all_edges_held_sparsely_give_the_dense_graphs_numbers(model, clt, graph):
    everything = attribute(model, clt, TOKENS, keep_edges=1.0)
    torch.testing.assert_close(everything.adjacency.to_dense(), graph.adjacency, rtol=1e-9, atol=1e-13)
    assert everything.unexplored == 0
    torch.testing.assert_close(everything.influence(), graph.influence())
    assert everything.scores() == pytest.approx(graph.scores())
    sparse, dense = everything.prune(), graph.prune()
    assert torch.equal(sparse.nodes.index, dense.nodes.index)
    torch.testing.assert_close(sparse.adjacency.to_dense(), dense.adjacency, rtol=1e-9, atol=1e-13)
    masks, wanted = everything.prune_masks(), graph.prune_masks()
    assert torch.equal(masks.nodes, wanted.nodes) and torch.equal(masks.edges, wanted.edges)


def test_it_survives_the_disk(sparse, tmp_path):
    loaded = AttributionGraph.load(sparse.save(tmp_path / "graph.safetensors"))
    assert loaded.is_sparse
    for ours, theirs in zip(csr_parts(loaded.adjacency), csr_parts(sparse.adjacency), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(loaded.dropped, sparse.dropped)
    assert loaded.scores() == sparse.scores()
    assert "edges, prompt" in repr(loaded)


@pytest.mark.parametrize("order", [[1, 0], [1, 1]])
def test_columns_that_do_not_rise_within_a_row_are_refused(sparse, tmp_path, order):
    """Twice the same edge, or edges out of order, of which torch's own products make what they like."""
    path = sparse.save(tmp_path / "graph")
    with safe_open(path, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    row = int((tensors["adjacency_starts"].diff() > 1).nonzero()[0])
    first = int(tensors["adjacency_starts"][row])
    tensors["adjacency_cols"][first : first + 2] = tensors["adjacency_cols"][first : first + 2][order]
    save_file(tensors, path, metadata)
    with pytest.raises(FormatError, match="adjacency_cols does not rise within each row"):
        AttributionGraph.load(path)


def test_pruning_and_showing_it(sparse):
    pruned = sparse.prune()
    assert pruned.is_sparse and len(pruned.nodes) < len(sparse.nodes)
    assert graph_tree(pruned).children
    node = int(sparse.nodes.where(NodeKind.LOGIT)[0])
    torch.testing.assert_close(sparse.in_edges(node), sparse.adjacency.to_dense()[node])
    held, dropped = float(sparse.in_edges(node).abs().sum()), float(sparse.dropped[node])
    assert float(sparse.input_shares(node).sum()) == pytest.approx(held / (held + dropped), rel=1e-12)
    assert 0.9 - 1e-12 <= held / (held + dropped) < 1


def test_expanding_part_of_a_sparse_graph(model, clt, graph):
    part = attribute(model, clt, TOKENS, keep_edges=0.95, max_unexplored=0.2, batch_size=4)
    shares = part.shares()
    assert shares.unexplored <= 0.2
    whole = graph.influence() / graph.logit_probs.sum()
    assert ((whole - part.influence() / part.logit_probs.sum()).abs() <= part.unexplored + 1e-12).all()


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_out_of_range_is_named(model, clt, share):
    with pytest.raises(ConfigError, match="keep_edges is"):
        attribute(model, clt, TOKENS, keep_edges=share)


@pytest.fixture
def limited(monkeypatch):
    """Traces as if this many bytes were left for rows and batches, by a process whose size does not waver."""
    monkeypatch.setattr(memory, "MARGIN", 0)
    monkeypatch.setattr(memory.Budget, "taken", lambda self: 0)

    def trace(model, clt, n_bytes, **options):
        return attribute(model, clt, TOKENS, memory_limit=n_bytes / 2**30, **options)

    return trace


def test_what_does_not_fit_is_refused_before_any_row_is_traced(model, clt, limited, monkeypatch):
    monkeypatch.setattr(Expansion, "__init__", lambda *a: pytest.fail("tracing began"))
    with pytest.raises(MemoryLimit, match=r"active features write \d+ vectors.*limit of 0\.00.*shorter prompt"):
        attribute(model, clt, TOKENS, memory_limit=1e-6)
    with pytest.raises(MemoryLimit, match=r"GiB for edges.*the limit is 0\.00.*keep_edges=0\.9.* max_unexplored"):
        limited(model, clt, 1e6)
    with pytest.raises(MemoryLimit, match="Give a higher memory_limit"):
        limited(model, clt, 1e6, keep_edges=0.9, max_unexplored=0.5)
    with pytest.raises(ConfigError, match="memory_limit is 0"):
        attribute(model, clt, TOKENS, memory_limit=0.0)


def test_the_batch_size_follows_the_limit(model, clt, graph, limited, monkeypatch):
    sizes, trace = [], Expansion.trace

    def note(self, features, batch_size, bar, ranked):
        sizes.append(batch_size)
        return trace(self, features, batch_size, bar, ranked)

    monkeypatch.setattr(Expansion, "trace", note)
    rows = int(graph.expanded.sum()) * len(graph.nodes) * 8
    for extra in (1.9e6, 2.0e6, 1e9):
        found = limited(model, clt, rows + extra)
        torch.testing.assert_close(found.adjacency, graph.adjacency)
    assert 1 <= sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] == min(memory.CPU_BATCH, int(graph.expanded.sum()))


@pytest.mark.parametrize(
    ("options", "room", "mend"),
    [({"keep_edges": 0.9}, 2.6e3, "smaller keep_edges"), ({}, 2e4, "a higher memory_limit")],
)
def test_a_trace_that_outgrows_its_room_ends_early_with_the_most_influential(
    model, clt, limited, monkeypatch, options, room, mend
):
    graph = attribute(model, clt, TOKENS, max_n_logits=1)
    at_work = engine_of(model, clt, monkeypatch).work_bytes(4)
    with pytest.warns(UserWarning, match=f"Tracing ended after .* unexplored share.*{mend}"):
        part = limited(model, clt, at_work + room, max_n_logits=1, max_unexplored=0.0, batch_size=4, **options)
    assert 0 < part.shares().unexplored < 1
    assert 5 < part.expanded.sum() < graph.expanded.sum()
    whole = graph.influence() / graph.logit_probs.sum()
    assert ((whole - part.influence() / part.logit_probs.sum()).abs() <= part.unexplored + 1e-12).all()
    features = graph.nodes.where(NodeKind.FEATURE)
    traced = part.expanded[features]
    assert whole[features][traced].mean() > whole[features][~traced].mean()


def engine_of(model, clt, monkeypatch):
    """The engine that such a trace uses."""
    found, begin = [], Expansion.__init__

    def note(self, engine, *others):
        found.append(engine)
        begin(self, engine, *others)

    with monkeypatch.context() as patched:
        patched.setattr(Expansion, "__init__", note)
        attribute(model, clt, TOKENS, max_n_logits=1)
    return found[0]


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_strongest_are_those_that_sorting_finds(share, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(50, 300, generator=generator, dtype=dtype).pow(8)
    sizes *= torch.logspace(-30, 20, 50, dtype=dtype)[:, None]
    sizes[:, ::7] = 0
    sizes[3] = 0  # Nothing comes in.
    sizes[4] = 1  # All alike.
    sizes[5, 2:] = 0  # One edge, since the first is 0.
    kept = memory.strongest(sizes, share)
    ordered = sizes.double().sort(dim=1, descending=True).values
    sums = ordered.cumsum(dim=1)
    # Rounding of sums of 300 numbers may move the end by one.
    wanted = share * sums[:, -1:]
    rounding = 300 * torch.finfo(dtype).eps * sums[:, -1:]
    least, most = (sums < wanted - rounding).sum(dim=1) + 1, (sums < wanted + rounding).sum(dim=1) + 1
    n = kept.sum(dim=1)
    some = ordered[:, 0] > 0
    if share < 1:
        assert ((least <= n) & (n <= most))[some].all()
    assert not kept[sizes == 0].any() and n[3] == 0 and n[5] == 1
    weakest_kept = torch.where(kept, sizes, torch.inf).amin(dim=1)
    strongest_left = torch.where(kept, 0, sizes).amax(dim=1)
    assert (weakest_kept >= strongest_left).all()


def test_what_was_not_traced_takes_no_memory_when_it_is_read_and_no_room_on_disk(model, clt, graph, tmp_path):
    part = attribute(model, clt, TOKENS, max_feature_nodes=5)
    path = part.save(tmp_path / "graph.safetensors")
    loaded = AttributionGraph.load(path)
    assert torch.equal(loaded.adjacency, part.adjacency)
    assert path.stat().st_size < 0.5 * graph.save(tmp_path / "whole.safetensors").stat().st_size
    n = 2**14
    before = machine.held_memory(torch.device("cpu"))
    rows = edges.zero_rows(n, torch.float32, torch.device("cpu"))
    assert float(rows[::2].sum()) == 0
    rows[5] = 1
    assert float(rows.sum()) == n
    assert machine.held_memory(torch.device("cpu")) - before < 2**29 + 2**27  # rows[::2] is a copy of half.
