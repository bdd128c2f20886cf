"""Write stores. Private; `activation_store` has the public names.

- `writer`: `StoreWriter`, which writes durable shards, resumed after a kill, one or several workers
- `shard_writer`: one shard, block by block, sealed under its final name
- `validation`: check and encode a batch before any of its rows is written
- `queue`: the background threads that write
- `virtual_index`: the whole store as one HDF5 file of virtual datasets
"""
