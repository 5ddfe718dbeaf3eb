"""Tasks: the prompts for training, generating and judging. One yaml with its data adds a task."""

from realera.callable_module import make_callable

make_callable(__name__)
