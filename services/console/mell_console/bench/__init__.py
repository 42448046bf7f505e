"""`mell bench`: loads any OpenAI-compatible server and says what its clients would see."""
