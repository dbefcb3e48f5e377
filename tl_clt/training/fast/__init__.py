"""The training step at the speed that training needs: an optional layer over `clt.py`, which defines its results."""
