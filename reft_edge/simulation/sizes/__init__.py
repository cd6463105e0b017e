"""What models weigh and cost on every reference board, whole and as planned; nothing here is emulated or timed."""
