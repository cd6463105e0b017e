"""The starter project that `reft-edge new` writes: it runs at once, and is changed step by step into one's own."""
