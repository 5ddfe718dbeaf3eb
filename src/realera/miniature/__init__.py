"""The workshop of the miniature: its world, its trainers, its measure. Nothing in the rest of the package imports
it."""
