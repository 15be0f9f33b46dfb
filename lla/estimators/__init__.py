"""Test-time regressors: sequence layers seen as predictors without trained parameters.

An estimator maps `(queries, keys, values)` to predictions. The prediction at position `t` is a
regression of the pairs `(keys[j], values[j])`, `j <= t` (the pair at `t` included), evaluated at
`queries[t]`; nothing later than `t` is read. All are chosen by name:

>>> from lla import estimators
>>> predict = estimators.create("mesanet", decay=0.95)
>>> predictions = predict(queries, keys, values)
"""

from lla.estimators.registry import Estimator, create, names, options, register

__all__ = ["Estimator", "create", "names", "options", "register"]
