"""The embedded engine: transformers' generate on a whole copy of the model on every rank, for laptops and tests."""
