"""The files of the ecosystem's viewers, written and read: one file a format."""

from tl_clt.viewer.formats.circuit_tracer import (
    FeatureBundles,
    load_circuit_tracer,
    save_circuit_tracer,
    save_circuit_tracer_features,
)
from tl_clt.viewer.formats.neuronpedia import (
    load_neuronpedia,
    load_neuronpedia_features,
    require_upload,
    save_neuronpedia,
    save_neuronpedia_features,
    upload_neuronpedia,
    upload_neuronpedia_features,
)

__all__ = [
    "FeatureBundles",
    "load_circuit_tracer",
    "load_neuronpedia",
    "load_neuronpedia_features",
    "require_upload",
    "save_circuit_tracer",
    "save_circuit_tracer_features",
    "save_neuronpedia",
    "save_neuronpedia_features",
    "upload_neuronpedia",
    "upload_neuronpedia_features",
]
