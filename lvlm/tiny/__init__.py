"""The embedded models: `architecture`, `training_stages`, `training_data`, `train`, `evaluate` and `release`, in this order."""
