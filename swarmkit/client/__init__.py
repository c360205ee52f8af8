"""Requests to one server: addresses, request and reply formats, HTTP, capabilities, chat templates.

Knows nothing of pandas or the scheduler: it sends a request to an endpoint and returns the reply as records.
Imports only ``errors``, ``records`` and ``text``.
"""
