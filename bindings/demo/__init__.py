"""`gradsift demo`: planted examples, found again."""
