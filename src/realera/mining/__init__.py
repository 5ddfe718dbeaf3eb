"""Which points around a concept are erased with it and which are held: Neighbour-Concept Mining and its relatives."""
