"""What an operator looks at in a browser. Reads what the coordinator has written, and changes nothing."""
