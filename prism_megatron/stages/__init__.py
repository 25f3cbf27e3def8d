"""The stages: their training loops and what they share."""
