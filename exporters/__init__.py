"""Exporters: one file per target, the artifact folder and its verification."""
