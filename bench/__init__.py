"""Benchmarks of the gateway beside its peers: `python -m bench forward`, or `./dev bench forward`.

docs/performance.md says what is measured and how to read it.  Linux only; nothing here is part of the product.
"""
