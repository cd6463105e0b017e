"""`python -m reft_edge`: the same as the `reft-edge` command."""

from reft_edge.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
