"""The float model in torch, as an engine: the reference that others are measured against."""
