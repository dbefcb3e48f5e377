"""A small model that recalls, adds, abbreviates, rhymes, opposes and diagnoses, and says so when it does not know."""
