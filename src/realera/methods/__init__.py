"""One file per erasure method. Each file defines parts of a `contracts.Method`. A method knows neither its task nor
its judge."""

from realera.callable_module import make_callable

make_callable(__name__)
