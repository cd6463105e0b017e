"""reft-edge: train one model across small devices without moving their data (REFT, arXiv 2308.13662)."""

__version__ = "0.1.0"
