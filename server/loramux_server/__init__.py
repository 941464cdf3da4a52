"""The loramux server: one quantized base model, many LoRA adapters, gRPC."""
