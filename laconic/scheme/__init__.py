"""Schemes as text: parsed, never evaluated; described, spelled and filled in."""
