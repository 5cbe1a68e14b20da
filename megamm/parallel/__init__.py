"""How a model is spread over ranks: process groups, the cut into stages, local launches."""
