"""The stage loops."""
