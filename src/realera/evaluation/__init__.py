"""From weights to numbers: images and their manifest, verdicts, metrics, the report. Knows no method and no command."""
