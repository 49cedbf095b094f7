"""Models: the zoo of declarations and the published recurrences."""
