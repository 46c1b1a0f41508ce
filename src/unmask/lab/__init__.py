"""Experiments: benchmarks, frontiers, studies. The library never imports them."""
