"""Faster ways through a stock model; each has a slower twin and a test that they agree."""
