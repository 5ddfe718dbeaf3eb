"""Erasures as files of other programs: pipeline folders, single checkpoints, LoRA files, maps, with a model card."""
