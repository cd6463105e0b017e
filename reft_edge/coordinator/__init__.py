"""The rounds: plan, publish, collect, merge, distil, evaluate, record."""
