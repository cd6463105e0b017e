"""Planner's truth: what is predicted for a device against what its worker then takes, in time and in memory."""
