"""An unmodified vLLM server as the engine of a worker, over its OpenAI API."""
