"""Fit, verify and cache teachers."""
