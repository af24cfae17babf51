"""Tensor functions that methods share."""
