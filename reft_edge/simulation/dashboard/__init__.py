"""How fast the dashboard shows a large fleet, in a real browser, and what it takes meanwhile."""
