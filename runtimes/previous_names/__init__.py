"""Modules under the names they had before version 0.2, for published Triton steps and for scripts; gone in 0.3.

`runtimes/__init__.py` adds this folder to the package's path, so that each file here is `runtimes.NAME`.
"""
