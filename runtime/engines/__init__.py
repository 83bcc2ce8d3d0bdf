"""Engines: `registry.py` has their names, a folder holds each one's runtime.

`engine.py` says what an engine of language models offers, `network_engine.py` what one of networks.
"""
