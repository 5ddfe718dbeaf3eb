"""One file per erasure method, each a set of parts of `contracts.Method`. A method knows neither its task nor its
judge."""

from realera.callable_module import make_callable

make_callable(__name__)
