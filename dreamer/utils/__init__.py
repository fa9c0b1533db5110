"""Tools that look into models and prove what they do. ``dreamer check`` runs them on a run."""
