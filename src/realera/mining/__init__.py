"""Neighbour-Concept Mining: which points around a concept are erased with it and which are preserved."""
