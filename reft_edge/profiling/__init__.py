"""What a device can do. Never imports torch."""
