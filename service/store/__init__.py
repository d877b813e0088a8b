"""The object store: a directory or an S3 bucket behind one interface. Start at `open_store`."""
