"""One file per erasure method, each a set of parts of `contracts.Method`. A method knows neither its task nor its
judge."""
