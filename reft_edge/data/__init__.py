"""Local data in the forms that devices and the coordinator share. Never imports torch."""
