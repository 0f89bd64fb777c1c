"""What the latent space looks like: metrics of a whole set, exact or sampled with a confidence interval."""
