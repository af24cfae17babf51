"""The open set of methods: one file per paper. Nothing is registered; `scheme.text.known_methods()` walks this folder."""
