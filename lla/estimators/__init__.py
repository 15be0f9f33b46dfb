"""Test-time regressors: sequence layers as predictors without trained parameters.

An estimator maps `(queries, keys, values)` to predictions. The prediction at position `t` is a
regression of the pairs `(keys[j], values[j])`, `j <= t`, evaluated at `queries[t]`. Estimators have
names:

>>> from lla import estimators
>>> predict = estimators.create("mesanet", decay=0.95)
>>> predictions = predict(queries, keys, values)
"""

from lla.estimators.registry import Estimator, create, names, options, register

__all__ = ["Estimator", "create", "names", "options", "register"]
