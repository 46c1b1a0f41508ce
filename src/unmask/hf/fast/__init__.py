"""Faster ways through a stock model; each file names its slow twin and the test that compares both."""
