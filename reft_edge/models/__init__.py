"""The built-in model zoo, a file a family. Loads torch only when a model is built."""

from reft_edge.models.registry import ZOO, ZooEntry, build_model, model_names

__all__ = ["ZOO", "ZooEntry", "build_model", "model_names"]
