"""Curvature on the query side: what a query's gradient is multiplied by before it is compared with rows."""
