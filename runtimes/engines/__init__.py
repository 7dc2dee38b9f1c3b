"""One file per engine; each declares `RUNTIME`, a subclass of `runtimes.runtime.Runtime`."""
