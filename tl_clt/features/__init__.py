"""What a feature means: contexts, output tokens, connections, and labels with a score."""

from tl_clt.features.collect import collect_features
from tl_clt.features.connections import strongest_connections
from tl_clt.features.endpoint import EndpointLabeller
from tl_clt.features.labels import Labeller, label_features
from tl_clt.features.logits import direct_logits, promoted_tokens
from tl_clt.features.rules import RuleLabeller, Variable
from tl_clt.features.store import FeatureRecord, FeatureStore

__all__ = [
    "EndpointLabeller",
    "FeatureRecord",
    "FeatureStore",
    "Labeller",
    "RuleLabeller",
    "Variable",
    "collect_features",
    "direct_logits",
    "label_features",
    "promoted_tokens",
    "strongest_connections",
]
