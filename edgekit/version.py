"""The version of this package and the name it is installed by, where every room may read them."""

__version__ = "0.1.0"

DISTRIBUTION = "edgekit-ml"
"""The name on the package index, where `edgekit` belongs to another project."""
