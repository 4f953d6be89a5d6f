"""Who maps chunks onto devices."""
