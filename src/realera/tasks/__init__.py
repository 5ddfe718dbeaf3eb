"""Tasks: which prompts are trained on, generated and judged. One yaml with its data adds one."""
