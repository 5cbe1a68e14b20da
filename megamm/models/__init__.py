"""Model families, their parts, and the one model that runs them all."""
