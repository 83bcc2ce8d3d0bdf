"""Engines: `engine.py` says what each offers, a folder holds each one's run time.

A folder's `decoder.py` opens language models, `network.py` networks; an engine without the file
cannot run the kind.
"""
