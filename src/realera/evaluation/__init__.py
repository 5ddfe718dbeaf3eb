"""Images and their manifest, verdicts, and metrics. This part imports no method and no command."""
