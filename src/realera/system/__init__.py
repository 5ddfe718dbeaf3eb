"""Disk, locks, signals, processes' ranks, the terminal, the network: what the operating system gives. No torch."""
