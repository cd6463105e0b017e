"""Models go out to the fleet: what there is, who gets which, in which order, and back again when it goes wrong."""
