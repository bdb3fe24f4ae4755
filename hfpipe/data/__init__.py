"""Sources, forms, mixtures and checks of training data."""
