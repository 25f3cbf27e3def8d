"""Rewards: is the format right, is the answer right, and the reward from both."""
