"""The same federated task with Flower and with reft-edge, process by process, measured by the same watcher.

Nothing here counts by itself what a side says about itself: memory and CPU time come from /proc, bytes from network
interfaces, accuracy from one function over the final weights.
"""
