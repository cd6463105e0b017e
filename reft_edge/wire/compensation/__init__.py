"""What a codec leaves out of an update is not lost: one file a method, each with its paper.

A method is the device's side of an encoding, with tensors to keep between rounds (`state`); those whose receiver needs
a memory of its own have a coordinator's side as well. Which codec encodes is a choice apart. Uses numpy.
"""
