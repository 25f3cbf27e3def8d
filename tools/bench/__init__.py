"""Benchmarks: ``python -m tools.bench.NAME``, each with ``--help``. ``tools/README.md`` lists them."""
