"""Access to the operating system: disk, locks, signals, processes, terminal, network. Imports no torch."""
