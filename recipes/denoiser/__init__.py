"""Denoiser: do the weights of a two-layer net gather in three blobs?"""
