"""Merging that withstands hostile devices: one algorithm a file, and what they share."""
