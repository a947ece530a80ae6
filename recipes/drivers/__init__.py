"""Drivers: which of thirteen bodies moves a target, and what will the target do next?"""
