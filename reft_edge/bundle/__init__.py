"""What travels: manifest, graphs and weights of one compiled variant. Never imports torch."""
