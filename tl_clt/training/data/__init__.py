"""From what a user gives as a dataset to batches of activations."""
