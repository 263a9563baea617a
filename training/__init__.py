"""Where artifacts come from: teacher -> distilled student -> aligned with a language model."""
