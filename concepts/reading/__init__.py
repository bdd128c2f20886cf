"""What loaders share: records and streams of files, questions about annotations, assembly into a dataset."""
