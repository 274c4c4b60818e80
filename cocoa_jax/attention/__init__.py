"""Attention under spans: every mask of the method is one interval of keys per query."""
