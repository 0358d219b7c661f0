"""How good a verbalization is and what it does: metrics, statistics, portability studies and the report."""
