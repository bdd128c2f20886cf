"""Private. Estimates of a trace before it runs: `estimate` combines sizes on disk (`sizes`), times (`times`) and operations.

Sizes come from the configuration of the model, its processor and the data, without reading weights. If the weights are on this
machine, some examples are traced for a bounded time and hours are extrapolated; a forward pass that takes longer is stopped
between two layers. Without weights, a model of the same width with two layers and random weights runs, and the times of its
layers are multiplied. For a GPU that this machine does not have, hours are operations divided by a stated speed, which is not
checked. Hours are for this machine; bytes and forward passes are for any.
"""
