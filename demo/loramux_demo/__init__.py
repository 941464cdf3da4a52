"""The demo: a small base model trained on checkable facts, its corpus, its judge and its tenants' training data."""
