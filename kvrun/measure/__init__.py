"""Measuring: several caches over one model's weights, what a cache format costs in quality, and how fast it all runs."""
