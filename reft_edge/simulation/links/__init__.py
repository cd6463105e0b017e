"""Links that misbehave on purpose: slow, far, cut, silent, lossy, out of order. For tests and measurements."""
