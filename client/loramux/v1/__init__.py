"""Generated code of the API package `loramux.v1`. Its sources are in protos/; `make protos` writes it."""
