"""Code: does a raw value from outside reach a dangerous call? Three models that tell."""
