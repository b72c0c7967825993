"""Planning: what a compiled program needs of a chip, read from its text, and the time that it takes at least."""
