"""Pages and pictures of what was measured. Nothing that computes imports them."""
