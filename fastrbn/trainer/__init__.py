"""A run of `fastrbn train` as its settings describe it: its model, loaders and transforms. Needs no command line."""
