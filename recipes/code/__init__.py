"""Code transformer: does a raw value from outside reach a dangerous call?"""
