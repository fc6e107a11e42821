"""Measure costs and plan a search."""
