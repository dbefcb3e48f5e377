"""Cross-layer transcoders for TransformerLens and SAELens: train, trace, test and see circuits.

Names are loaded when they are first used, so that `import tl_clt` is quick and pulls in neither SAELens nor a
plotting or web library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_clt.attribution import AttributionGraph, NodeKind, attribute
    from tl_clt.evaluation import evaluate, measure_faithfulness
    from tl_clt.interventions import (
        Intervention,
        intervene,
        intervention_hooks,
        measure_interaction,
        sweep_end_layer,
        sweep_strength,
        validate,
    )
    from tl_clt.lens import frozen_hooks, load_model
    from tl_clt.organisms import load_organism
    from tl_clt.replacement import attach
    from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig
    from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig, public_transcoders

__version__ = "0.1.0"

_ROOMS = {
    "AttributionGraph": "attribution",
    "CLTTrainingRunner": "training",
    "CLTTrainingRunnerConfig": "training",
    "CrossLayerTranscoder": "transcoder",
    "CrossLayerTranscoderConfig": "transcoder",
    "Intervention": "interventions",
    "NodeKind": "attribution",
    "attach": "replacement",
    "attribute": "attribution",
    "evaluate": "evaluation",
    "frozen_hooks": "lens",
    "intervene": "interventions",
    "intervention_hooks": "interventions",
    "load_model": "lens",
    "load_organism": "organisms",
    "measure_faithfulness": "evaluation",
    "measure_interaction": "interventions",
    "public_transcoders": "transcoder",
    "sweep_end_layer": "interventions",
    "sweep_strength": "interventions",
    "validate": "interventions",
}

__all__ = [
    "AttributionGraph",
    "CLTTrainingRunner",
    "CLTTrainingRunnerConfig",
    "CrossLayerTranscoder",
    "CrossLayerTranscoderConfig",
    "Intervention",
    "NodeKind",
    "attach",
    "attribute",
    "evaluate",
    "frozen_hooks",
    "intervene",
    "intervention_hooks",
    "load_model",
    "load_organism",
    "measure_faithfulness",
    "measure_interaction",
    "public_transcoders",
    "sweep_end_layer",
    "sweep_strength",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'tl_clt' has no attribute '{name}'")
    value = getattr(import_module(f"tl_clt.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
