"""Task readers, the canonical example, and the mixture of tasks."""
