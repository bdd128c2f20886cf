"""Numerical solvers of the probes, each with a bound on its error. Private; `probes` has the public names.

- `logistic_reference`: many logistic regressions in float64: Newton (`newton`), with a duality gap
- `logistic_float32`: the same in float32 (`lbfgs` in `rotated_features`), certified in float64 (`duality_gap`)
- `multinomial`: softmax regression, certified
- `closed_form`: ridge, linear discriminant and mean difference from one factorization
- `ridge_many_labels`: ridge for thousands of permuted labels
- `constant_columns`, `allocator`: constant columns; memory that is kept for later fits
"""
