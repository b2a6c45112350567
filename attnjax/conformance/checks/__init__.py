"""The checks, by subject. A check takes a Subject and raises ViolationError."""
