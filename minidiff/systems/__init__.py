"""Floor V: whole systems, each a page composed of the floors below."""
