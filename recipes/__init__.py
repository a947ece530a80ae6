"""Experiments that can be run from a checkout, one folder each."""
