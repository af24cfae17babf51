"""The open set of methods: one file per paper. Nothing is registered; `laconic.scheme.text.known_methods()` walks this
folder.
"""
