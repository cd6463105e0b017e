"""What recovery costs: bytes, seconds and memory, measured with real brokers, processes and links."""
