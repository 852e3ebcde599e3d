"""Models behind HTTP: an OpenAI-compatible server on the one engine. `craton serve` starts it."""
