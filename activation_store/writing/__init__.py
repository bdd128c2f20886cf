"""Write stores: queue, shards, index. Private; `activation_store` has the public names."""
