"""The trainer: turns a tenant's conversations into a LoRA adapter on the NF4 bytes that the server runs."""
