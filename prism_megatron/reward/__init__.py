"""Rewards: is the format right, is the answer right, and the two together."""
