"""Analytic estimates of memory and step time from model sizes, layouts and unit costs."""
