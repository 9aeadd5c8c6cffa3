"""A task in many languages: by the stack, by its LLM alone, and by translating first."""
