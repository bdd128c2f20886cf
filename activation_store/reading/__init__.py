"""Read stores. Private; `activation_store` has the public names.

- `store`: `ActivationStore`, with arrays, the example table, model-level arrays
- `folder`: one folder or several, opened without reading activations
- `catalog`: the array, layer and columns of a site, token selection and head
- `query`, `rows`: rows by the values of columns; rows of a layer from the bytes of a file
- `integrity`, `hdf5_safety_child`: verify every byte; old files are examined in a child process
"""
