"""One file per command; each imports click only, and its work inside the function."""
