"""What follows from an intervention as its strength, its end layer, or a second one beside it varies."""

from tl_clt.interventions.sweeps.end_layer import EndLayerSweep, sweep_end_layer
from tl_clt.interventions.sweeps.interaction import Interaction, measure_interaction
from tl_clt.interventions.sweeps.strength import StrengthSweep, sweep_strength

__all__ = [
    "EndLayerSweep",
    "Interaction",
    "StrengthSweep",
    "measure_interaction",
    "sweep_end_layer",
    "sweep_strength",
]
