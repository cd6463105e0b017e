"""A federation's private authority: certificates for broker, coordinator and devices, and taking them back.

Works on one folder, the provisioning directory, which holds the authority's private key: it belongs to the operator
and is needed neither by the coordinator nor by a device.
"""
