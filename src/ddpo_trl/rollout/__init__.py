"""Samples of a round: batch plan, loader, advantages, and the end of a round."""
