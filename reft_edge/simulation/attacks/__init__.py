"""Hostile devices in one process, to measure what merging and teaching withstand."""
