"""Built-in cases of `gradsift eval`: trainings that can be repeated in minutes on a CPU."""
