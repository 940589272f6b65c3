"""Rendered indoor scenes with depth and classes, and the trees they are written as."""
