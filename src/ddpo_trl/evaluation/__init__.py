"""Figures and images of prompts of their own, made with the scheduler that the pipeline's users will run."""
