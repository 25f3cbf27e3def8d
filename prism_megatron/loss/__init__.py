"""Losses over packed tokens and over pairs of scores. Log-probabilities come in, never logits."""
