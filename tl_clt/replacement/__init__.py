"""A CLT in place of a model's MLPs, through hooks."""

from tl_clt.replacement.attach import Mode, attach, is_replaced, require_free
from tl_clt.replacement.fit import check_fit, not_read

__all__ = ["Mode", "attach", "check_fit", "is_replaced", "not_read", "require_free"]
