"""Graphs put to the test: features changed by plain hooks, and what follows from it."""

from tl_clt.interventions.hooks import ThroughLayer, intervention_hooks
from tl_clt.interventions.intervene import InactiveFeature, InterventionEffect, intervene
from tl_clt.interventions.intervention import (
    AnyIntervention,
    DirectionIntervention,
    Intervention,
    parse_intervention,
    swap_interventions,
)
from tl_clt.interventions.supernodes import SupernodeReport, measure_supernodes
from tl_clt.interventions.sweeps import (
    EndLayerSweep,
    Interaction,
    StrengthSweep,
    measure_interaction,
    sweep_end_layer,
    sweep_strength,
)
from tl_clt.interventions.validation import validate
from tl_clt.interventions.validation_report import ValidationReport
from tl_clt.lens import Freeze

__all__ = [
    "AnyIntervention",
    "DirectionIntervention",
    "EndLayerSweep",
    "Freeze",
    "InactiveFeature",
    "Interaction",
    "Intervention",
    "InterventionEffect",
    "StrengthSweep",
    "SupernodeReport",
    "ThroughLayer",
    "ValidationReport",
    "intervene",
    "intervention_hooks",
    "measure_interaction",
    "measure_supernodes",
    "parse_intervention",
    "swap_interventions",
    "sweep_end_layer",
    "sweep_strength",
    "validate",
]
