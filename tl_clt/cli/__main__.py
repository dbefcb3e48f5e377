"""`python -m tl_clt.cli`, for torchrun."""

from tl_clt.cli import app

app()
