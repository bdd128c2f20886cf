"""How a probe is fitted and scored. Private; `probes` has the public names.

- `inputs`: read and check labels, groups and features of a store
- `splits`, `tasks`: held-out groups and folds; concepts with their shuffled controls
- `estimators`: the methods of fitting, an open registry
- `cell`: one layer or head: select C, fit, score once on held-out rows
- `scoring`: scores, and intervals clustered by group
- `controls`: shuffled and random labels
- `checkpoint`: finished layers, to continue a killed run
"""
