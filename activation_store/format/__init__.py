"""The file format; `schema` describes it. Private; `activation_store` has the public names.

- `schema`: the layout on disk, and the data classes of a store's contents
- `manifest`, `shard`, `model_tensors`: the files of a store
- `hdf5`, `columns`, `encoding`, `ragged`, `compression`: the elements of a file
- `seal`, `digests`, `folder_checks`, `hdf5_safety`: digests of files, blocks and folders, and how they are checked
- `buffered_file`, `mapped_file`: the bytes of a file, without HDF5's file drivers
- `provenance_versions`: provenance of earlier releases, for comparison
"""
