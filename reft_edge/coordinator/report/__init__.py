"""What a run was: its figures as values, and pages made of them."""
