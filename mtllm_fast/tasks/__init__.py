"""Stage 2: an LLM fine-tuned on a task in English, and a stack that learns to say what it says of other languages."""
