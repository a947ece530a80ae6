"""Subcommands of `lightning-diag`, each a small typer app of its own."""
