"""Tasks: which prompts are trained on, generated and judged. One yaml with its data adds one."""

from realera.callable_module import make_callable

make_callable(__name__)
