"""One file per Triton backend; each declares `BACKEND`, an `export.triton.backend.Backend`."""
