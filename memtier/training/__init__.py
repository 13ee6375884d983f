"""Recipes that train models; importing this package does no work and needs no part of the runtime."""
