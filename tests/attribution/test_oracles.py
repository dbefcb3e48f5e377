"""The same numbers as circuit-tracer on the same model, CLT and tokens, for four architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_clt import AttributionGraph, CrossLayerTranscoder, NodeKind, attribute

ORACLES = Path(__file__).parents[1] / "data" / "oracles"
CASES = ["gpt2", "llama", "gemma", "neox", "gpt2-mlpin", "llama-mlpin", "gemma-mlpin", "neox-mlpin", "llama-plt-skip"]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[AttributionGraph, dict[str, torch.Tensor]]:
    """Our graph and circuit-tracer's numbers."""
    folder = ORACLES / request.param
    model = HookedTransformer(HookedTransformerConfig(**json.loads((folder / "cfg.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    clt = CrossLayerTranscoder.from_pretrained(folder / "clt")
    tokens = json.loads((folder / "tokens.json").read_text())
    graph = attribute(model, clt, tokens, bos="drop", bias_nodes=False)
    return graph, load_file(folder / "expected.safetensors")


def test_same_active_features_and_activations(case):
    graph, expected = case
    features = graph.nodes.take(graph.nodes.where(NodeKind.FEATURE))
    found = torch.stack([features.layer, features.pos, features.index], dim=1)
    assert torch.equal(found, expected["active_features"])
    torch.testing.assert_close(features.activation, expected["activations"], atol=1e-4, rtol=1e-4)


def test_same_adjacency(case):
    graph, expected = case
    difference = graph.adjacency - expected["adjacency"]
    assert difference.norm() <= 1e-4 * expected["adjacency"].norm()
    assert difference.abs().max() <= 1e-3 * expected["adjacency"].abs().max()


def test_same_logits(case):
    graph, expected = case
    assert torch.equal(graph.nodes.index[graph.nodes.where(NodeKind.LOGIT)], expected["logit_tokens"])
    torch.testing.assert_close(graph.logit_probs, expected["logit_probs"], atol=1e-5, rtol=1e-4)


def test_pruning_keeps_the_same_nodes_and_edges(case):
    graph, expected = case
    masks = graph.prune_masks(node_threshold=0.8, edge_threshold=0.98)
    # Edges agree to 1e-4: a node that lies so near to the threshold may fall on either side of it, with its edges.
    assert (masks.nodes ^ expected["node_mask"]).sum() <= 1
    assert (masks.edges ^ expected["edge_mask"]).sum() <= 0.02 * expected["edge_mask"].sum()


def test_same_scores(case):
    graph, expected = case
    scores = torch.tensor(graph.scores(definition="circuit-tracer"))
    torch.testing.assert_close(scores, expected["scores"], atol=1e-3, rtol=0)
