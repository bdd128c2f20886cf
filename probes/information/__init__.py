"""How much information about a concept a simple reader can use at each site of a path, in nats.

- `path`: `information_path` of sites of stores, `measure_information` of arrays; `results`: `InformationPath`
- `families`: `predictive_families`, the open registry of readers; `linear`, `nonlinear`: its entries
- `cross_fitting`: choose a penalty inside the training groups, with no reading among the choices; `folds`, `reduction`
- `changes`, `width_control`: falls and rises between consecutive sites
- `infonce`: a documented baseline, bounded by the logarithm of the number of candidates
- `plot`: the figure of a path
"""
