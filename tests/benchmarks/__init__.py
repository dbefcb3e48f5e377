"""Measurements, run by hand: each prints a table and says on what it was measured. Not collected by pytest."""
