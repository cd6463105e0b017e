"""A training step in onnxruntime against the same step in torch eager: time, memory, share of the machine's peak."""
