"""gradsift eval: which method to believe on this data."""
