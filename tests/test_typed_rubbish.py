"""Typed rubbish for every argument of every public function: it works, or raises one of this package's errors that
says what to do; the model stays as it was.

One argument at a time is rubbish, the others are right. `RUBBISH_EXAMPLES` in the environment sets how many values each
argument gets.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

import tl_clt
from tests.models import snapshot, tiny_bridge, tiny_clt
from tl_clt import attribution, evaluation, features, interventions
from tl_clt.attribution import AttributionGraph, DifferenceTarget, DirectionTarget, FeatureTarget, TokenTarget
from tl_clt.errors import TlCltError
from tl_clt.interventions import DirectionIntervention, Intervention
from tl_clt.lens import model_fingerprint
from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig

EXAMPLES = int(os.environ.get("RUBBISH_EXAMPLES", "3"))

# -- rubbish ---------------------------------------------------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text for this")


def _tensors() -> st.SearchStrategy[Any]:
    shapes = st.sampled_from([(), (0,), (1,), (3,), (32,), (2, 3), (1, 7), (2, 0), (1, 1, 2), (5, 3, 32)])
    dtypes = st.sampled_from([torch.float64, torch.float16, torch.long, torch.uint8, torch.bool, torch.complex64])
    devices = st.sampled_from(["cpu", "cpu", "cpu", "meta"])
    fills = st.sampled_from([0, 1, 5, 200])

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, fill: int) -> torch.Tensor:
        return torch.full(shape, fill, dtype=dtype, device=device)

    return st.builds(make, shapes, dtypes, devices, fills)


SPECIAL: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 5, 63, 64, -(10**6), 2**63, 10**30, 10**5000, 0.0, 0.5, 1.0, 1.5, -2.5),
    *(float("nan"), float("inf"), 1e308, 1 + 2j, "", " ", "w3", "w3 w4 w5", "nowhere", "\ud83d", "a\0b", "cpu", "all"),
    *("none", "float32", b"w3", bytearray(b"w3"), Path("nowhere"), [], (), {}, set(), frozenset({1}), {1, 2}),
    *([None], [True], [1.5], ["w3", 4], [[]], [[1, 2], [3]], [10**30], ["\ud83d"], [object()], (1, 2, 3), range(3)),
    *({"w3": 1}, {1: 2}, {"input_ids": [1, 2, 3]}, {"input_ids": None}, {"input_ids": [3, 4], "attention_mask": [1]}),
    BatchEncoding({"input_ids": [[0, 3, 4], [0, 3, 2]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}),
    *(slice(None), slice(0, 0), slice("a"), ..., NotImplemented, object(), object, len, lambda: None, Unprintable()),
    *(np.int64(3), np.float32(0.5), np.bool_(True), np.str_("w3"), np.datetime64("2020"), np.timedelta64(3, "ns")),
    *(
        np.array(3),
        np.array([]),
        np.array([1, 2]),
        np.array([1.5]),
        np.array(["w3"]),
        np.array([None]),
        np.zeros((2, 2)),
    ),
    *(pd.NA, pd.NaT, pd.Timestamp(0), pd.Series([1, 2]), pd.Series(["w3", "w4"]), pd.DataFrame({"a": [1]})),
    *(torch.nn.Linear(2, 2), torch.float32, torch.device("cpu"), torch.tensor([1.0, 2.0]).to_sparse()),
    *(TokenTarget(3), Intervention(layer=0, feature=1, scale=0.0), (i for i in ())),
]

RUBBISH = st.one_of(
    st.sampled_from(SPECIAL),
    st.sampled_from(SPECIAL),
    _tensors(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.integers(-70, 70), st.floats()), max_size=3),
)

# -- what is called --------------------------------------------------------------------------------------


class Right(NamedTuple):
    """Right values of everything."""

    model: Any
    clt: CrossLayerTranscoder
    graph: AttributionGraph
    feature: int
    """Number of a feature node of the graph."""
    effect: Any
    inputs: torch.Tensor
    cache: Any
    store: tl_clt.FeatureStore
    folder: Path


def _attach(model: Any, clt: Any, mode: Any) -> None:
    with tl_clt.attach(model, clt, mode):
        pass


def _replaced(model: Any, clt: Any) -> None:
    with evaluation.replaced(model, clt):
        pass


TOKENS = [0, 7, 19, 4]
CHANGE = Intervention(layer=1, pos=-1, feature=3, add=1.0)
"""Quick calls: few tokens, few rows."""


def calls(right: Right) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public function with right arguments, by name."""
    model, clt, graph = right.model, right.clt, right.graph
    pair = {"model": model, "clt": clt}
    run = CLTTrainingRunnerConfig(d_transcoder=4)
    one = {**pair, "prompt": TOKENS, "targets": [3, 4], "pos": -1, "freeze": "none", "progress": False}
    direction = torch.ones(32, dtype=torch.float64)
    exported = {
        **{"graph": graph, "slug": "g", "scan": "m", "node_threshold": 0.8, "edge_threshold": 0.9},
        **{"features": None, "labels": {(0, 1): "words"}, "pinned": [-1], "supernodes": {"outputs": [-1]}},
    }
    return {
        "attribute": (
            tl_clt.attribute,
            {
                **{**pair, "prompt": TOKENS, "targets": [3], "max_n_logits": 2, "desired_logit_prob": 0.5},
                **{"max_feature_nodes": 3, "max_unexplored": 0.5, "engine": "sweep", "bos": "error"},
                **{"bias_nodes": True, "batch_size": 4, "progress": False, "contrast": None, "keep_edges": None},
                **{"memory_limit": None},
            },
        ),
        "contrast": (tl_clt.attribute, {**pair, "prompt": TOKENS, "targets": [3], "contrast": [0, 7, 20, 4]}),
        "attach": (_attach, {**pair, "mode": "observe"}),
        "replaced": (_replaced, pair),
        "frozen_hooks": (tl_clt.frozen_hooks, {"cache": right.cache, "patterns": True, "scales": True}),
        "TokenTarget": (TokenTarget, {"token": 3, "pos": -1}),
        "DifferenceTarget": (DifferenceTarget, {"plus": 3, "minus": 4, "pos": -1}),
        "FeatureTarget": (FeatureTarget, {"layer": 1, "feature": 3, "pos": -1}),
        "DirectionTarget": (
            DirectionTarget,
            {"direction": direction, "hook": "blocks.1.hook_resid_post", "pos": -1, "name": "up"},
        ),
        "check_thresholds": (attribution.check_thresholds, {"node_threshold": 0.8, "edge_threshold": 0.9}),
        "build_local_model": (attribution.build_local_model, {**pair, "tokens": torch.tensor(TOKENS), "bos": "error"}),
        "graph.prune": (graph.prune, {"node_threshold": 0.8, "edge_threshold": 0.9}),
        "graph.prune_masks": (graph.prune_masks, {"node_threshold": 0.8, "edge_threshold": 0.9}),
        "graph.scores": (graph.scores, {"definition": "paper"}),
        "graph.in_edges": (graph.in_edges, {"node": 3}),
        "graph.input_shares": (graph.input_shares, {"node": 3}),
        "graph.load": (AttributionGraph.load, {"path": "nowhere"}),
        "Intervention": (
            Intervention,
            {"layer": 1, "pos": -1, "feature": 3, "add": 1.0, "prompt": None, "seed": 0},
        ),
        "Intervention.of": (Intervention.of, {"graph": graph, "node": right.feature, "scale": 0.0}),
        "feature_acts": (tl_clt.feature_acts, {**pair, "prompt": TOKENS}),
        "Intervention.value": (Intervention, {"layer": 1, "feature": [3, 4], "value": [1.0, 2.0]}),
        "Intervention.scale": (Intervention, {"layer": 1, "feature": 3, "scale": 2.0}),
        "Intervention.noise": (Intervention, {"layer": 1, "feature": 3, "noise": 2.0}),
        "DirectionIntervention": (
            DirectionIntervention,
            {"layer": 1, "pos": -1, "vector": direction, "add": 1.0, "prompt": None, "seed": 0},
        ),
        "parse_intervention": (interventions.parse_intervention, {"text": "1:-1:3=0", "setter": "value"}),
        "intervention_hooks": (
            tl_clt.intervention_hooks,
            {
                **{**pair, "prompt": TOKENS, "interventions": [CHANGE], "through_layer": None, "freeze": "attention"},
                **{"attention_mask": None},
            },
        ),
        "intervene": (
            tl_clt.intervene,
            {
                **{**pair, "prompt": TOKENS, "interventions": [CHANGE], "through_layer": 2, "freeze": "attention"},
                **{"attention_mask": None},
            },
        ),
        "intervene.masked": (
            tl_clt.intervene,
            {**pair, "prompt": torch.tensor([TOKENS]), "interventions": CHANGE, "attention_mask": [[1, 1, 1, 1]]},
        ),
        "effect.top_changes": (right.effect.top_changes, {"k": 3, "pos": -1}),
        "swap_interventions": (
            interventions.swap_interventions,
            {**pair, "prompt": TOKENS, "source": [0, 5, 6], "positions": {1: 2}, "features": [(1, 3)]},
        ),
        "graph_figures": (
            tl_clt.graph_figures,
            {"graph": graph, **pair, "node_threshold": 0.8, "edge_threshold": 0.9, "labels": {(0, 1): "words"}},
        ),
        "save_neuronpedia": (
            tl_clt.save_neuronpedia,
            {**exported, "path": "g.json", "source_set": "set", "description": "words"},
        ),
        "save_circuit_tracer": (tl_clt.save_circuit_tracer, {**exported, "folder": "graphs"}),
        "load_neuronpedia": (tl_clt.load_neuronpedia, {"path": "g.json"}),
        "load_circuit_tracer": (tl_clt.load_circuit_tracer, {"path": "g.json"}),
        "sweep_end_layer": (tl_clt.sweep_end_layer, {**one, "interventions": [CHANGE]}),
        "sweep_strength": (
            tl_clt.sweep_strength,
            {**one, "interventions": [CHANGE], "strengths": [1.0], "through_layer": 2, "tolerance": None},
        ),
        "measure_interaction": (
            tl_clt.measure_interaction,
            {**one, "first": CHANGE, "second": Intervention(layer=0, feature=2, add=1.0), "through_layer": None},
        ),
        "validate": (
            tl_clt.validate,
            {
                **{"graph": graph, **pair, "n_features": 1, "scale": 0.0, "freeze": "attention", "threshold": 0.01},
                **{"batch_size": 4, "seed": 0, "progress": False},
            },
        ),
        "evaluate": (
            tl_clt.evaluate,
            {
                **{**pair, "dataset": [TOKENS], "max_tokens": 10, "context_size": 8, "n_graphs": 0, "graph_tokens": 4},
                **{"max_unexplored": 0.9, "seed": 0, "progress": False},
            },
        ),
        "finetune": (
            # A large number of steps or directions is no rubbish, and takes long.
            partial(tl_clt.finetune, n_steps=1),
            {
                **{**pair, "prompts": [TOKENS], "kl": 1.0, "downstream": 1.0, "jacobian": 1.0, "across": 1.0},
                **{"sparsity": None, "lr": 1e-3, "batch_size": 2, "context_size": 8, "pos": -1, "seed": 0},
                **{"progress": False},
            },
        ),
        "measure_faithfulness": (
            tl_clt.measure_faithfulness,
            {
                **{"model": model, "clts": clt, "prompts": [TOKENS], "kinds": ["random"], "n_perturbations": 1},
                **{"size": 0.1, "freeze": ["all"], "model_freeze": ["none"], "batch_size": 4, "seed": 0},
                **{"progress": False},
            },
        ),
        "measure_curves": (
            evaluation.measure_curves,
            {
                **{"model": model, "clts": clt, "prompts": [TOKENS], "targets": [3], "metric": "logit"},
                **{"counterfactuals": [[*TOKENS[:-1], 9]], "errors": "nodes", "rankings": ["random"]},
                **{"level": "nodes"},
                **{"shares": [0.5, 1.0], "freeze": "none", "max_feature_nodes": None, "batch_size": 4, "seed": 0},
                **{"progress": False},
            },
        ),
        "find_neurons": (evaluation.find_neurons, {"model": model, "prompts": [TOKENS], "kept": 0.5}),
        "find_supernodes": (
            tl_clt.find_supernodes,
            {
                **{"graph": graph, "among": [right.feature], "n_groups": 1, "similarity": 0.5, "responses": None},
                **{"response_weight": 0.5, "across_positions": False, "signed": True},
            },
        ),
        "measure_supernodes": (
            tl_clt.measure_supernodes,
            {
                **{**pair, "graph": graph, "supernodes": {"one": [right.feature]}, "n_random": 1, "scale": 0.0},
                **{"through_layer": None, "freeze": "none", "batch_size": 4, "seed": 0, "progress": False},
            },
        ),
        "prune_to_behaviour": (
            tl_clt.prune_to_behaviour,
            {
                **{**pair, "graph": graph, "share": 0.5, "edge_threshold": 0.9, "log_prob": False},
                **{"counterfactual": None, "freeze": "none", "batch_size": 32, "seed": 0},
            },
        ),
        "direct_logits": (features.direct_logits, {**pair, "layer": 1, "features": torch.tensor([3])}),
        "promoted_tokens": (features.promoted_tokens, {**pair, "layer": 1, "features": torch.tensor([3]), "k": 2}),
        "clt.encode": (clt.encode, {"x": right.inputs}),
        "clt.forward": (clt.forward, {"x": right.inputs}),
        "clt.decode": (clt.decode, {"feature_acts": clt.encode(right.inputs), "x": None}),
        "clt.decoder_rows": (clt.decoder_rows, {"source": 1, "features": torch.tensor([3])}),
        "clt.save_pretrained": (clt.save_pretrained, {"folder": right.folder, "layout": "native"}),
        "from_pretrained": (
            CrossLayerTranscoder.from_pretrained,
            {"folder_or_hub_repo": right.folder, "device": "cpu", "dtype": None, "lazy_decoder": False},
        ),
        "CrossLayerTranscoder": (CrossLayerTranscoder, {"cfg": clt.cfg, "decoders": None}),
        "CrossLayerTranscoderConfig": (CrossLayerTranscoderConfig, _values(clt.cfg)),
        "load_model": (tl_clt.load_model, {"name_or_path": "./nowhere", "backend": "hooked"}),
        "load_model.device": (tl_clt.load_model, {"name_or_path": "./nowhere", "device": "cpu", "dtype": "float32"}),
        "collect_features": (
            tl_clt.collect_features,
            {
                **{**pair, "text": [TOKENS], "folder": "store", "max_tokens": 10, "context_size": 8, "n_top": 2},
                **{"n_per_band": 1, "before": 2, "after": 1, "n_logits": 2, "n_connected": 2, "label_tokens": 0},
                **{"resume": False, "progress": False},
            },
        ),
        "FeatureStore.open": (tl_clt.FeatureStore.open, {"folder": "store"}),
        "label_features": (
            tl_clt.label_features,
            {**pair, "store": right.store, "labeller": repr, "features": [(0, 1)], "seed": 0, "progress": False},
        ),
        "load_features": (tl_clt.load_features, {"name": "nowhere"}),
        "load_organism": (
            tl_clt.load_organism,
            {"name": "nowhere", "backend": "hooked", "device": "cpu", "dtype": torch.float32},
        ),
        "CLTTrainingRunnerConfig": (CLTTrainingRunnerConfig, {**run.to_dict(), "clt": run.clt, "data": run.data}),
        "CLTTrainingRunner": (
            CLTTrainingRunner,
            {
                **{"cfg": run, "model": model, "dataset": torch.zeros(9, 9).long()},
                **{"on_progress": None, "on_start": None},
            },
        ),
    }


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


NAMES = (
    *("attribute", "contrast", "attach", "replaced", "frozen_hooks", "TokenTarget", "DifferenceTarget"),
    *("FeatureTarget", "DirectionTarget", "check_thresholds", "build_local_model", "graph.prune", "graph.prune_masks"),
    *("graph.scores", "graph.in_edges", "graph.input_shares", "graph.load", "Intervention", "Intervention.value"),
    *("Intervention.of", "feature_acts"),
    *("Intervention.scale", "Intervention.noise", "DirectionIntervention", "parse_intervention", "intervention_hooks"),
    *("intervene", "intervene.masked", "effect.top_changes", "swap_interventions", "sweep_end_layer"),
    *("sweep_strength", "measure_interaction", "validate", "evaluate", "measure_faithfulness", "measure_curves"),
    "find_neurons",
    *("find_supernodes", "measure_supernodes", "prune_to_behaviour", "direct_logits", "finetune"),
    *("promoted_tokens", "clt.encode", "clt.forward", "clt.decode", "clt.decoder_rows", "clt.save_pretrained"),
    *("from_pretrained", "CrossLayerTranscoder", "CrossLayerTranscoderConfig", "load_model", "load_model.device"),
    *("graph_figures", "save_neuronpedia", "save_circuit_tracer", "load_neuronpedia", "load_circuit_tracer"),
    *("collect_features", "FeatureStore.open", "label_features", "load_features"),
    *("load_organism", "CLTTrainingRunnerConfig", "CLTTrainingRunner"),
)


@pytest.fixture(scope="module")
def without_checks() -> Iterator[None]:
    """As users run it: without run-time checks of annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def right(without_checks: None, tmp_path_factory: pytest.TempPathFactory) -> Right:
    model = tiny_bridge("gpt2", tmp_path_factory.mktemp("model"), exact=True)
    clt = tiny_clt(model)
    # What TransformerLens itself keeps on first use with a mask is there before.
    model(torch.tensor([TOKENS]), attention_mask=torch.ones(1, len(TOKENS), dtype=torch.long))
    _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    graph = tl_clt.attribute(model, clt, TOKENS, targets=[3, 4], progress=False)
    store = tmp_path_factory.mktemp("features") / "store"
    return Right(
        model=model,
        clt=clt,
        graph=graph,
        feature=int(graph.nodes.where(tl_clt.NodeKind.FEATURE)[0]),
        effect=tl_clt.intervene(model, clt, TOKENS, CHANGE),
        inputs=torch.stack([cache[f"blocks.{t}.hook_resid_mid"][0] for t in clt.layers], dim=1).detach(),
        cache=cache,
        store=tl_clt.collect_features(model, clt, [TOKENS] * 16, store, progress=False),
        folder=clt.save_pretrained(tmp_path_factory.mktemp("clt") / "saved"),
    )


def test_every_public_function_is_called(right: Right):
    called = set(calls(right))
    assert called == set(NAMES)
    takes_nothing = {"public_transcoders", "NodeKind", "AttributionGraph"}
    assert set(tl_clt.__all__) - takes_nothing <= {name.partition(".")[0] for name in called}


@pytest.mark.parametrize("name", NAMES)
def test_rubbish_is_refused_by_name_and_changes_nothing(right: Right, tmp_path_factory, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    function, arguments = calls(right)[name]
    before, fingerprint = snapshot(right.model), model_fingerprint(right.model)

    @settings(
        max_examples=EXAMPLES * len(arguments),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(which=st.sampled_from(sorted(arguments)), value=RUBBISH)
    def throw(which: str, value: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function(**{**arguments, which: value})
            except TlCltError as error:
                assert len(str(error)) > 20

    throw()
    after = snapshot(right.model)
    assert {key for key in before if after[key] != before[key]} <= {"random state"}
    assert model_fingerprint(right.model) == fingerprint
