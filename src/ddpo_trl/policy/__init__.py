"""A diffusers pipeline as a policy: sampling, log-probabilities of denoising steps, and the trained weights."""
