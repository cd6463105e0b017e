"""What runs on a device. Never imports torch or the coordinator."""
