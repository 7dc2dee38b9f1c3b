"""One file per target; each declares `TARGET`, an `export.target.Target`."""
