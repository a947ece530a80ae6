"""Glyphs and their names: an autoencoder that draws and describes, trained on three losses."""
