"""Torch modules of the memory layers: fading memory, innovation and eidetic choice, span attention, the B'MOJO mixer."""
