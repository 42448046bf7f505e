"""The OpenAI-compatible HTTP service: owns each client's stream and arbitrates who may continue it."""
