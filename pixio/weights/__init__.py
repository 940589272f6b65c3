"""Weights in, from any source to one strict state dict, and out again."""
