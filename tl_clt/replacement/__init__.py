"""A CLT in place of a model's MLPs, through hooks."""

from tl_clt.replacement.attach import Mode, attach, is_replaced, replaced, require_free
from tl_clt.replacement.feature_acts import feature_acts, layer_inputs
from tl_clt.replacement.fit import check_fit, not_read

__all__ = [
    "Mode",
    "attach",
    "check_fit",
    "feature_acts",
    "is_replaced",
    "layer_inputs",
    "not_read",
    "replaced",
    "require_free",
]
