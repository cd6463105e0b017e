"""Deployments to a fleet of emulated devices, each a real agent: how long, how safely, and whether anything is lost.

versions    what is deployed: exported by the product from models that were trained for seconds
bad_models  what no device should ever serve
site        a prepared folder with everybody's settings, keys and data, and its broker
crew        the processes: agents, and an operator's commands
observer    who reads along at the broker
served      what devices serve, read from their disks
load        a constant load on one server
records     settings and finished runs
"""
