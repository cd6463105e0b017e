"""Partitions of a data set and emulated devices, for trying a federation on one machine."""
