"""Torch modules: fading memory, innovation and eidetic choice, span attention, the B'MOJO mixer."""
