"""`edgekit inspect`: `report.py` finds the target's reporter; the others are parts of reports."""
