"""What benchmarks have in common: finished runs kept in a file, where they ran, and how they are shown."""
