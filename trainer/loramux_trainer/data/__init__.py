"""Training data: reading, checking, splitting, rendering and labels."""
