"""The samples of a round: batch plan, loader, advantages, and what happens at a round's boundary."""
