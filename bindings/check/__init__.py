"""`gradsift check`: its command and how its report looks."""
