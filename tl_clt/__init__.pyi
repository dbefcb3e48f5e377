# The public names, and where each is: the one list of them. `__init__.py` reads it, and so do editors.
from tl_clt.attribution import AttributionGraph as AttributionGraph
from tl_clt.attribution import NodeKind as NodeKind
from tl_clt.attribution import attribute as attribute
from tl_clt.attribution import find_supernodes as find_supernodes
from tl_clt.evaluation import evaluate as evaluate
from tl_clt.evaluation import measure_faithfulness as measure_faithfulness
from tl_clt.evaluation import prune_to_behaviour as prune_to_behaviour
from tl_clt.features import FeatureStore as FeatureStore
from tl_clt.features import collect_features as collect_features
from tl_clt.features import label_features as label_features
from tl_clt.finetuning import finetune as finetune
from tl_clt.interventions import Intervention as Intervention
from tl_clt.interventions import intervene as intervene
from tl_clt.interventions import intervention_hooks as intervention_hooks
from tl_clt.interventions import measure_interaction as measure_interaction
from tl_clt.interventions import measure_supernodes as measure_supernodes
from tl_clt.interventions import sweep_end_layer as sweep_end_layer
from tl_clt.interventions import sweep_strength as sweep_strength
from tl_clt.interventions import validate as validate
from tl_clt.lens import frozen_hooks as frozen_hooks
from tl_clt.lens import load_model as load_model
from tl_clt.organisms import load_features as load_features
from tl_clt.organisms import load_organism as load_organism
from tl_clt.replacement import attach as attach
from tl_clt.replacement import feature_acts as feature_acts
from tl_clt.training import CLTTrainingRunner as CLTTrainingRunner
from tl_clt.training import CLTTrainingRunnerConfig as CLTTrainingRunnerConfig
from tl_clt.transcoder import CrossLayerTranscoder as CrossLayerTranscoder
from tl_clt.transcoder import CrossLayerTranscoderConfig as CrossLayerTranscoderConfig
from tl_clt.transcoder import public_transcoders as public_transcoders
from tl_clt.viewer import graph_figures as graph_figures
from tl_clt.viewer import load_circuit_tracer as load_circuit_tracer
from tl_clt.viewer import load_neuronpedia as load_neuronpedia
from tl_clt.viewer import save_circuit_tracer as save_circuit_tracer
from tl_clt.viewer import save_neuronpedia as save_neuronpedia

__version__: str
