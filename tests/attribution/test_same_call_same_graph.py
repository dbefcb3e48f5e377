"""Two identical calls in one process give identical graphs, to the bit."""

from __future__ import annotations

import pytest
import torch

from tl_clt import attribute, load_organism

PROMPT = "the capital of the state containing Dallas is"


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("options", [{}, {"keep_edges": 0.9}, {"max_feature_nodes": 40}, {"max_unexplored": 0.1}])
@pytest.mark.parametrize("engine", ["sweep", "autograd"])
def test_identical_calls_give_identical_graphs(engine: str, options: dict, backend: str):
    model, clt = load_organism("atlas", backend=backend)
    one, other = (attribute(model, clt, PROMPT, engine=engine, **options) for _ in range(2))
    assert torch.equal(one.adjacency.to_dense(), other.adjacency.to_dense())
    for name in ("kind", "layer", "pos", "index", "activation"):
        assert torch.equal(getattr(one.nodes, name), getattr(other.nodes, name)), name
    assert torch.equal(one.expanded, other.expanded)
    assert torch.equal(one.logit_probs, other.logit_probs)
    assert torch.equal(one.influence(), other.influence())
