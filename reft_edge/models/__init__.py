"""The built-in model zoo, a file a family."""
