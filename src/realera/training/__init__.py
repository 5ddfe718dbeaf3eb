"""From a method and a backbone to erased weights: the Lightning loop, the edit before it, the files it leaves. Knows no
command."""
