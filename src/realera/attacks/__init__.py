"""One file per attack on erased models (`attack_contract.Attack`). An attack knows neither the judge nor the method."""

from realera.callable_module import make_callable

make_callable(__name__)
