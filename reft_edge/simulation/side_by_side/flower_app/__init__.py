"""A Flower app as its documentation shows one; it runs in Flower's environment, which has no reft-edge.

`net.py`, `client.py`, `server.py` and `app.toml`, which becomes its pyproject.toml, are copied out of here.
"""
