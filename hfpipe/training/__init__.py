"""What trains: tokenizers, templates, models, optimizers and the run that all stages share."""
