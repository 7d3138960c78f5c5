"""Slimmable networks and the diffusion model that trains them, in backend-neutral Keras 3."""
