"""The engines of the local servers: their protocol, an echo for tests, a small real model through OpenVINO.

Knows nothing of HTTP, nor of any other part of swarmkit.
"""
